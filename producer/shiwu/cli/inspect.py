"""The commands that read: results and status."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Final

import click
from pydantic_core import to_json
from rich.table import Table
from rich.text import Text

from shiwu.cli.base import Exit, main
from shiwu.cli.terminal import echo_json, make_console
from shiwu.client.client import Client
from shiwu.client.stream_items import UnreadableItem, give_up
from shiwu.contract import Lane, printable

MAX_OUTAGE_S: Final = 5.0
"""How long Redis may be unavailable while the command reads without --follow."""
ACK_MAX_OUTAGE_S: Final = 3600.0
"""How long --follow retries to acknowledge a printed answer, which would otherwise be printed again."""


@main.command()
@click.option("--group", default="shiwu-cli", show_default=True, help="Consumer group; each group gets every answer.")
@click.option(
    "--consumer",
    help="Consumer name; with the name of a crashed one, its unacknowledged answers come immediately.",
)
@click.option("--follow", is_flag=True, help="Wait for more answers instead of ending.")
@click.pass_obj
def results(client: Client, /, *, group: str, consumer: str | None, follow: bool) -> None:
    """Print answers of all jobs as JSON lines, and acknowledge each one that was printed.

    Without --follow the command ends when all answers are printed. It first takes over answers that a crashed consumer
    of the group holds, a minute after that consumer was last active.
    """
    if sys.stdout is None:
        raise click.UsageError("expected an open standard output, because an answer that was printed is acknowledged")
    block_s = 2.0 if follow else 0.05
    away_s = None if follow else MAX_OUTAGE_S
    try:
        for item in client.results(
            group=group,
            consumer=consumer,
            block_s=block_s,
            stop_when_idle=not follow,
            away_s=away_s,
            on_unreadable=_show_unreadable,
        ):
            try:
                echo_json(item.result.to_json())
            except OSError:
                give_up(item)  # or the next call would wait a minute for it
                raise
            item.ack(away_s=ACK_MAX_OUTAGE_S if follow else MAX_OUTAGE_S)
    except KeyboardInterrupt:
        sys.exit(Exit.OK)


def _show_unreadable(item: UnreadableItem) -> None:
    click.echo(f"shiwu: entry {item.entry_id} was skipped and stays pending: {printable(item.reason)}", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def status(client: Client, /, *, as_json: bool) -> None:
    """Show waiting and claimed jobs, totals, and the workers that run."""
    state, stray = client.queue_state(), client.stray_lanes()
    if as_json:
        echo_json(to_json(asdict(state) | {"stray_lanes": stray.found}))
        return
    table = Table("lane", "waiting", "claimed", "oldest", box=None)
    for lane in Lane:
        age_s = state.oldest_age_s.get(lane)
        oldest = "" if age_s is None else f"{age_s:.1f} s"
        table.add_row(lane.value, str(state.waiting[lane]), str(state.claimed[lane]), oldest)
    console = make_console()
    console.print(table)
    console.print(
        f"delayed {state.delayed}, quarantined {state.quarantined}, dead letters {state.dead}, ",
        f"workers {len(state.workers)}",
        sep="",
        end="",
    )
    console.print(f": {', '.join(map(printable, state.workers))}" if state.workers else " (no heartbeat in 10 s)")
    console.print(", ".join(f"{printable(name)} {number}" for name, number in state.counters.items()))
    for stray_lane in stray.found:
        console.print(Text("not read by any worker:", style="yellow"), printable(str(stray_lane)), soft_wrap=True)
    if stray.found:
        console.print("a client's global_keyprefix, sep, priority_steps or database differs: docs/clients.md")
