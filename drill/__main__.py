"""`make drill`: runs drills and prints their results. The exit code is 0 only if all promises were kept."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from redis import RedisError
from rich.console import Console
from rich.table import Table
from tests.support.failover import Failover
from tests.support.redis_server import RedisServer, redis_binary, valkey_binary
from tests.support.servers import Valkey
from tests.support.valkey_cluster import ValkeyCluster

from drill import shards
from drill.catalogue import DRILLS, Drill
from drill.drill_run import DrillRun, Outcome
from shiwu.broker.connection import connect
from shiwu.broker.queue_stats import read_state
from shiwu.contract import CLAIMS, DELAYED_MESSAGES, QUARANTINE, WORKERS, Lane


def run(
    drill: Drill,
    *,
    seed: int,
    short: bool,
    jobs: int | None = None,
    rounds: int | None = None,
    url: str | None = None,
    lasts_s: float | None = None,
    binary: Path | None = None,
) -> Outcome:
    """One drill on a Redis of its own, or on the one given.

    Args:
        binary: starts this server, and not Valkey.
    """
    size = drill.short if short else drill.long
    with tempfile.TemporaryDirectory(prefix="shiwu-drill-") as name, ExitStack() as stack:
        server = stack.enter_context(own_server(drill, Path(name) / "servers", binary)) if url is None else None
        drill_run = DrillRun(
            url=url_of(server) if server else str(url),
            folder=Path(name),
            rng=random.Random(f"{seed}-{drill.name}"),
            jobs=jobs or size[0],
            rounds=rounds or size[1],
            stack=stack,
            server=server,
            lasts_s=drill.lasts_s[0 if short else 1] if lasts_s is None else lasts_s,
            prefix=f"{drill.name}-{seed}-{int(time.time())}." if url else "d",
        )
        try:
            return drill.run(drill_run)
        except TimeoutError as error:
            return drill_run.finish(drill.name, promised_s=0, timeout_s=5, wrong=[str(error)])


def own_server(drill: Drill, folder: Path, binary: Path | None) -> Any:
    """The server that a drill breaks, not yet started."""
    if drill.server == "sentinels":
        return Failover(folder=folder, replicas=2)
    if drill.server == "cluster":
        return ValkeyCluster(folder=folder, primaries=shards.PRIMARIES, replicas=shards.REPLICAS, config=shards.CONFIG)
    config = {"appendonly": "yes", "appendfsync": "always"}
    if drill.server == "loads":
        config["loading-process-events-interval-bytes"] = "1024"
    if binary is not None or drill.server == "loads":
        return RedisServer(folder=folder, binary=binary or valkey_binary(), config=config)
    return Valkey(folder=folder, config=config)


def url_of(server: Any) -> str:
    """Where workers and clients ask."""
    return server.url(shards=shards.SHARDS) if isinstance(server, ValkeyCluster) else str(server.url)


def held_by(url: str) -> dict[str, int]:
    """What a Redis holds that a drill would confuse with its own: waiting, claimed and delayed jobs, workers."""
    with connect(url, timeout_s=5.0, retries=0) as client:
        lengths = {key: int(client.llen(key)) for key in (*(key for lane in Lane for key in lane.keys), QUARANTINE)}
        lengths |= {key: int(client.hlen(key)) for key in (CLAIMS, DELAYED_MESSAGES)}
        lengths[WORKERS] = len(read_state(client).workers)
    return {key: length for key, length in lengths.items() if length}


def refuse_busy(url: str, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse a Redis that is unavailable, or that others use."""
    try:
        held = held_by(url)
    except RedisError as error:
        refuse(f"expected a Redis that answers at --redis-url, got {type(error).__name__}: {error}")
    if held:
        found = ", ".join(f"{key} {length}" for key, length in held.items())
        refuse(
            f"expected a Redis without jobs and workers at --redis-url, it holds {found}; drills break its workers "
            "and count every answer: use an empty database, or wait until all jobs are answered and stop the workers"
        )


COLUMNS = (
    "drill",
    "enqueued",
    "answered",
    "twice",
    "lost",
    "late",
    "re-run",
    "discarded",
    "breaks",
    "recovery",
    "kept",
)


def show(outcomes: list[Outcome]) -> None:
    """A row for each drill."""
    table = Table(*COLUMNS, box=None)
    for outcome in outcomes:
        recovery = f"{outcome.recovery_max_s:.2f} of {outcome.promised_s:g} s" if outcome.breaks else "–"
        numbers = (
            outcome.enqueued,
            outcome.answered,
            outcome.twice,
            outcome.lost,
            outcome.late,
            outcome.rerun,
            outcome.discarded,
            outcome.breaks,
        )
        table.add_row(outcome.name, *map(str, numbers), recovery, "yes" if outcome.is_kept else "NO")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for outcome in outcomes:
        statuses = ", ".join(f"{name} {count}" for name, count in sorted(outcome.statuses.items()))
        console.print(f"{outcome.name}: {statuses}{'; ' + outcome.notes if outcome.notes else ''}", markup=False)
        for what in outcome.wrong:
            console.print(f"{outcome.name}: NOT AS PROMISED: {what}", markup=False, style="bold red")


def main() -> None:
    """Run the drills that were named, or all."""
    parser = argparse.ArgumentParser(prog="drill", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="DRILL", help=f"{', '.join(DRILLS)}; default: all of them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--short", action="store_true", help="the short form that the tests run")
    parser.add_argument("--jobs", type=int, help="enqueued in each round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--minutes",
        type=float,
        help="length of `together`, `soak`, `away`, of each black hole in `hole` and each freeze in `shards`",
    )
    parser.add_argument("--redis-server", action="store_true", help="start a Redis (6.2) instead of Valkey")
    parser.add_argument("--redis-url", help="an existing Redis (staging!) instead of a new one")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args()
    unknown = set(options.names) - DRILLS.keys()
    if unknown:
        parser.error(f"expected drills of {', '.join(DRILLS)}, got {', '.join(sorted(unknown))}")
    binary = redis_binary() if options.redis_server else None
    chosen = [DRILLS[name] for name in options.names or DRILLS]
    if options.redis_url:
        chosen = [drill for drill in chosen if drill.server == "any"]
        refuse_busy(options.redis_url, parser.error)
    print(f"seed {options.seed}", file=sys.stderr)
    outcomes = []
    for drill in chosen:
        print(f"{drill.name}: {drill.about}", file=sys.stderr)
        outcome = run(
            drill,
            seed=options.seed,
            short=options.short,
            jobs=options.jobs,
            rounds=options.rounds,
            url=options.redis_url,
            lasts_s=options.minutes and options.minutes * 60,
            binary=binary,
        )
        outcomes.append(outcome)
        if options.json:
            print(json.dumps(asdict(outcome) | {"kept": outcome.is_kept, "seed": options.seed}), flush=True)
        elif len(chosen) > 1:
            show([outcome])
    if not options.json:
        show(outcomes)
    sys.exit(0 if all(outcome.is_kept for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
