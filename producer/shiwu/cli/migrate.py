"""The command that moves a database of an earlier version to the names of this one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

import click

from shiwu.broker.connection import PoolOptions
from shiwu.broker.migration import Moved, find_workers, move_names, plan_moves
from shiwu.broker.sharding import ShardRedis, open_shards
from shiwu.cli.base import main
from shiwu.client.calls import ClientOptions
from shiwu.contract import printable
from shiwu.errors import ShiwuError

TIMEOUT_S: Final = 30.0
"""A portion may have large messages, which the server copies."""
MAX_NAMED: Final = 5


class WorkersRun(ShiwuError):
    """Workers run, so that jobs would be written under old names during the migration or after it."""

    code = "workers_run"


@main.command()
@click.option("--dry-run", is_flag=True, help="Only print what would be moved.")
@click.option("--force", is_flag=True, help="Move although workers had a heartbeat in the last ten seconds.")
@click.pass_context
def migrate(ctx: click.Context, /, *, dry_run: bool, force: bool) -> None:
    """Move the keys of an earlier version to their names in this one.

    Stop all workers and sweeps first; producers may go on enqueueing. Each line has the old name, the new name, and how
    many entries were moved. A run that was interrupted is repeated. With nothing to move, nothing is changed.

    Exit code 4: workers run (`workers_run`).
    """
    url = ctx.find_root().params["redis_url"]
    options = ClientOptions.read(url, max_waiting=1, timeout_s=TIMEOUT_S, max_connections=1)
    limits = PoolOptions(timeout_s=TIMEOUT_S, retries=3, max_connections=1, client_name="shiwu-migrate")
    with ExitStack() as stack:
        shards = [stack.enter_context(shard) for shard in open_shards(options.redis_url, limits)]
        if not (dry_run or force):
            _refuse_workers(shards)
        has_moved = False
        for shard in shards:
            for moved in plan_moves(shard) if dry_run else move_names(shard):
                click.echo(printable(_line(moved, prefix=shard.shard.prefix)))
                has_moved = True
    if not has_moved:
        click.echo("nothing to move")


def _refuse_workers(shards: list[ShardRedis]) -> None:
    names = sorted({name for shard in shards for name in find_workers(shard)})
    if names:
        shown = ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
        raise WorkersRun(
            f"expected no workers, got {len(names)} with a heartbeat in the last ten seconds ({shown}); stop them and "
            "try again, or use --force"
        )


def _line(moved: Moved, *, prefix: str) -> str:
    if not moved.new:
        return f"{prefix}{moved.old} dropped"
    kept = f", {moved.kept} of them were there already" if moved.kept else ""
    return f"{prefix}{moved.old} → {prefix}{moved.new}: {moved.count}{kept}"
