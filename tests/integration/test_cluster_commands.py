"""Every command of `shiwu` works with `cluster://`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from shiwu.cli import main
from shiwu.contract import Lane
from tests.support.answering_shards import AnsweringShards
from tests.support.valkey_cluster import ValkeyCluster

SHARDS = 4
WORKS = {
    "backfill cancel": (["n"], 2),
    "backfill list": ([], 0),
    "backfill pause": (["n"], 2),
    "backfill report": (["n"], 2),
    "backfill resume": (["n"], 2),
    "backfill status": (["n"], 2),
    "hooks list": ([], 0),
    "hooks retry": (["--all"], 0),
    "hooks status": ([], 0),
    "top": (["--once"], 0),
    "watch": (["--unread"], 0),
    "cancel": (["k1"], 0),
    "dead drop": (["k1"], 0),
    "dead list": ([], 0),
    "dead requeue": (["k1"], 1),
    "dead show": (["k1"], 1),
    "enqueue": (["s3://pictures/a.jpg"], 0),
    "explain": (["k1"], 1),
    "gallery": (["k1"], 1),
    "labels": (["abc"], 1),
    "migrate": ([], 0),
    "results": (["--group", "g"], 0),
    "shards": ([], 0),
    "status": ([], 0),
    "sweep": (["--once"], 0),
    "tag": (["s3://pictures/a.jpg", "--timeout", "0"], 3),
}
"""Command → its arguments, and its exit code where the cluster is empty."""
NOT_ON_EMPTY = {"backfill start", "vectors sink"}
"""Those that need jobs or do not end by themselves; `test_backfill_shards` and `test_vector_shards` run them."""
NO_REDIS = {"hooks test"}


def leaves(group: click.Group, context: click.Context, before: str = "") -> Iterator[str]:
    """The names of all commands that are no groups."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, context, f"{before}{name} ")
        else:
            yield before + name


def shiwu(url: str, command: str, *args: str) -> Result:
    """Run a command."""
    return CliRunner().invoke(main, ["--redis-url", url, *command.split(), *args])


def test_each_command_is_listed_here() -> None:
    """A new command must say what it does over shards."""
    assert set(leaves(main, click.Context(main))) == WORKS.keys() | NOT_ON_EMPTY | NO_REDIS


@pytest.mark.parametrize("command", WORKS)
def test_command_works_on_an_empty_cluster(cluster: ValkeyCluster, command: str) -> None:
    """It finds no job, and says so."""
    args, code = WORKS[command]
    result = shiwu(cluster.url(shards=SHARDS), command, *args)
    assert result.exit_code == code, result.output


def test_commands_send_jobs_and_read_their_answers(cluster: ValkeyCluster, tmp_path: Path) -> None:
    """From the list to the answers, the dead letters and the sizes."""
    url = cluster.url(shards=SHARDS)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"k{n}\ts3://pictures/{'broken' if n % 5 == 0 else 'ok'}{n}.jpg\n" for n in range(40)))
    sent = shiwu(url, "enqueue", "--from-file", str(listed))
    assert sent.output.split() == [f"k{n}" for n in range(40)]
    shards = [json.loads(line) for line in shiwu(url, "shards", "--json").output.splitlines()]
    assert sum(shard["waiting"][Lane.BULK] for shard in shards) == 40
    assert all(int(shard["node"].rpartition(":")[2]) == cluster.owner(shard["slot"]) for shard in shards)
    with AnsweringShards(url):
        assert shiwu(url, "tag", "s3://pictures/a.jpg").exit_code == 0
        answers: set[str] = set()
        while len(answers) < 41:
            lines = shiwu(url, "results").output.splitlines()
            answers |= {json.loads(line)["id"] for line in lines}
    dead = {json.loads(line)["id"] for line in shiwu(url, "dead list", "--json").output.splitlines()}
    assert dead == {f"k{n}" for n in range(0, 40, 5)}
    assert shiwu(url, "dead requeue", "--all").output.split()
    state = json.loads(shiwu(url, "status", "--json").output)
    assert (state["waiting"][Lane.BULK], state["dead"], len(state["shards"])) == (8, 0, SHARDS)


def test_shards_shows_the_others_while_one_is_away(cluster: ValkeyCluster) -> None:
    """The reason stands below its row; the exit code says that one is away."""
    url = cluster.url(shards=SHARDS)
    first = json.loads(shiwu(url, "shards", "--json").output.splitlines()[0])
    port = cluster.owner(first["slot"])
    cluster.server(port).pause()
    try:
        result = shiwu(url, "shards")
    finally:
        cluster.server(port).resume()
    assert result.exit_code == 4
    rows = [line for line in result.output.splitlines() if line[:1].isdigit()]
    assert len(rows) == SHARDS
    assert "away" in rows[0]
    assert any("away" not in row for row in rows)
