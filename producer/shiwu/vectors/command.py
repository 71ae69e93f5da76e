"""The command group `shiwu vectors`. Imports nothing that takes time before a command runs."""

from __future__ import annotations

import signal
from contextlib import ExitStack, closing
from importlib.util import find_spec
from threading import Event
from typing import Final

import click

from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.cli.base import Exit, end, redis_url_of
from shiwu.cli.params import Seconds

TIMEOUT_S: Final = 5.0
LIBRARIES: Final = ("pyarrow", "boto3", "obstore")


@click.group()
def vectors() -> None:
    """Keep the vectors of answers, so that other labels need no image."""


@vectors.command()
@click.option("--group", required=True, help="The consumer group; use one for each folder.")
@click.option("--out", required=True, metavar="FOLDER|s3://BUCKET/PREFIX/", help="Where the Parquet parts go.")
@click.option(
    "--part-rows", type=click.IntRange(1, 10_000_000), default=50_000, show_default=True, help="Vectors of one part."
)
@click.option(
    "--part-age",
    "part_age_s",
    type=Seconds(least_s=0.001),
    default=300.0,
    show_default=True,
    help="Seconds after which a part is completed with fewer vectors.",
)
@click.option("--stop-when-idle", is_flag=True, help="End once all answers are stored; otherwise run until SIGTERM.")
@click.pass_context
def sink(
    ctx: click.Context, /, *, group: str, out: str, part_rows: int, part_age_s: float, stop_when_idle: bool
) -> None:
    """Store the vector of each answer that has one, each once, also after a crash.

    Answers have a vector if their request wants it: `shiwu enqueue --want tags --want vector`. A new group begins with
    the oldest answer of the results stream. Run one sink for a group. On SIGTERM and Ctrl-C it completes its part.
    """
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        end(f"vectors sink needs {missing[0]}: run `pip install '.[vectors]'` in a clone of shiwu", Exit.USAGE)
    from shiwu.parts import Objects, open_target  # noqa: PLC0415 slow
    from shiwu.vectors.sink import TEMPORARY, VectorSink, check_start  # noqa: PLC0415 slow

    url = redis_url_of(ctx)
    address = out if out.endswith("/") or not out.startswith("s3://") else f"{out}/"
    stopped = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with ExitStack() as stack:
        clients = open_shards(url, PoolOptions(timeout_s=TIMEOUT_S))
        acks = open_shards(url, PoolOptions(timeout_s=TIMEOUT_S, retries=3))
        for client in (*clients, *acks):
            stack.enter_context(closing(client))
        target = stack.enter_context(closing(open_target(address, objects=Objects(), temporary=TEMPORARY)))
        check_start(clients, group, stop=stopped)
        made = VectorSink(
            clients=clients,
            acks=acks,
            target=target,
            group=group,
            part_rows=part_rows,
            part_age_s=part_age_s,
            on_part=lambda name, rows: click.echo(f"{name}: {rows} vectors", err=True),
            is_stopping_when_idle=stop_when_idle,
        )
        while not (stopped.is_set() or made.is_at_end):
            made.step()
        made.record()
    damaged = f", {made.damaged} could not be read" if made.damaged else ""
    click.echo(f"{made.stored} vectors stored{damaged}", err=True)
