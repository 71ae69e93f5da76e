"""The command that shows the shards of a cluster."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Final

import click
from pydantic_core import to_json

from shiwu.cli.base import Exit, main
from shiwu.cli.terminal import Row, echo_json, print_rows
from shiwu.client.client import Client
from shiwu.client.shard_states import ShardState

HEADINGS: Final = ("shard", "tag", "slot", "node", "waiting", "claimed", "oldest")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def shards(client: Client, /, *, as_json: bool) -> None:
    """Show the shards of a cluster: where each is, what waits and what is claimed.

    Exit code 4: a shard is unavailable; the others are shown.
    """
    found = client.shard_states()
    if as_json:
        for shard in found:
            echo_json(to_json(_fields(shard)))
    else:
        print_rows(HEADINGS, map(_row, found), text_columns=(3,), optional=(2, 1))
    if any(shard.error is not None for shard in found):
        sys.exit(int(Exit.QUEUE))


def _fields(shard: ShardState) -> dict[str, object]:
    state = asdict(shard.state) if shard.state is not None else {}
    shown = {name: state.get(name) for name in ("waiting", "claimed", "oldest_age_s", "delayed", "dead")}
    return {
        "index": shard.index,
        "tag": shard.tag,
        "slot": shard.slot,
        "node": shard.node,
        **shown,
        "error": shard.error,
    }


def _row(shard: ShardState) -> Row:
    place = [str(shard.index), shard.tag, "" if shard.slot is None else str(shard.slot), shard.node or "–"]
    if shard.state is None:
        return Row([*place, "–", "–", "away"], notes=[shard.error or ""], red=6)
    ages_s = shard.state.oldest_age_s.values()
    oldest = f"{max(ages_s):.1f} s" if ages_s else ""
    return Row([*place, str(sum(shard.state.waiting.values())), str(sum(shard.state.claimed.values())), oldest])
