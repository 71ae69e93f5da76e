"""How `shiwu watch` starts: addresses, --check, rules, keys of other types and missing libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import redis

from tests.support.processes import LOOPBACK, free_ports
from tests.support.waiting import wait_until
from tests.support.watch import KEY, push, run_watch, source, watch_process, write_rules


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The file of rules."""
    return write_rules(tmp_path)


def test_check_tells_what_waits_and_takes_nothing(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """In one line for each part."""
    push(redis_client, "a.jpg")
    result = run_watch(redis_url, source(redis_url), "--rules", str(rules), "--check")
    assert result.exit_code == 0
    assert f"rules: 2 in {rules}" in result.stdout
    assert "redis: answers" in result.stdout
    assert f"source: {redis_url}?key={KEY}: 1 messages wait" in result.stdout
    assert redis_client.llen(KEY) == 1


@pytest.mark.parametrize(
    ("address", "exit_code", "expected"),
    [
        ("", 2, "expected a SOURCE"),
        ("ftp://x", 64, "expected redis://host/0?key=KEY"),
        ("redis://user:secret@127.0.0.1/0", 64, "expected the key of the bucket events"),
        ("redis://user:secret@127.0.0.1/0?key=a&format=xml", 64, "format: expected access or namespace, got 'xml'"),
        ("redis://user:secret@127.0.0.1/zero?key=a", 64, "expected the number of a database"),
        ("redis://user:secret@127.0.0.1:1/0?key=a", 4, "redis_away"),
        ("http://0.0.0.0:1/x", 2, "expected --token-file FILE"),
        ("http://user@127.0.0.1:1/x", 2, "expected http://ADDRESS:PORT/PATH"),
        ("http://127.0.0.1:99999/x", 2, "expected http://ADDRESS:PORT/PATH"),
    ],
)
def test_wrong_source_is_refused(redis_url: str, rules: Path, address: str, exit_code: int, expected: str) -> None:
    """With what was expected, and without the password."""
    result = run_watch(redis_url, address, "--rules", str(rules), "--check")
    assert (result.exit_code, expected in result.stderr) == (exit_code, True), result.stderr
    assert "secret" not in result.output


def test_key_of_another_type_is_refused(redis_url: str, redis_client: redis.Redis, rules: Path) -> None:
    """And a format that differs from that of the key."""
    redis_client.set(KEY, "x")
    result = run_watch(redis_url, source(redis_url), "--rules", str(rules), "--once")
    assert (result.exit_code, "got a string" in result.stderr) == (64, True)
    redis_client.delete(KEY)
    push(redis_client, "a.jpg")
    result = run_watch(redis_url, source(redis_url, ending="&format=namespace"), "--rules", str(rules), "--once")
    assert (result.exit_code, "got a list" in result.stderr) == (64, True)


def test_missing_library_is_named(redis_url: str, rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra to install; and a name that would be a key of another kind is refused."""
    monkeypatch.delitem(sys.modules, "shiwu.watch.receiver", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run_watch(redis_url, "http://127.0.0.1:1/x", "--rules", str(rules), "--check")
    assert (result.exit_code, "pip install '.[watch]'" in result.stderr) == (2, True)
    for name in ("shiwu.watch.running", "shiwu.watch.rules", "shiwu.cli.yaml_files"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "yaml", None)
    result = run_watch(redis_url, source(redis_url), "--rules", str(rules), "--check")
    assert (result.exit_code, "watch needs yaml" in result.stderr) == (2, True)
    result = run_watch(redis_url, source(redis_url), "--name", "a b")
    assert result.exit_code == 2


def test_wrong_rules_end_the_watcher(redis_url: str, tmp_path: Path) -> None:
    """With exit code 64 and what was expected."""
    path = write_rules(tmp_path, "- match: {}\n  lane: fast")
    result = run_watch(redis_url, source(redis_url), "--rules", str(path))
    assert (result.exit_code, "expected" in result.stderr or "'bulk'" in result.stderr) == (64, True)
    assert run_watch(redis_url, source(redis_url)).exit_code == 2


@pytest.mark.parametrize("kind", ["redis", "http"])
def test_watcher_says_what_it_watches(redis_url: str, tmp_path: Path, kind: str) -> None:
    """Before the first event, and without the password."""
    write_rules(tmp_path)
    [port] = free_ports(1)
    with_login = source(redis_url).replace("redis://", "redis://default:hush@")
    where = with_login if kind == "redis" else f"http://{LOOPBACK}:{port}/events"
    with watch_process(redis_url, where, folder=tmp_path) as watch:
        wait_until(lambda: "2 rules" in watch.log_text(), timeout_s=30, what="the line about the start")
        assert watch.stop() == 0
    [line] = (line for line in watch.log_text().splitlines() if "watching" in line)
    assert line.startswith("shiwu: watching ")
    assert (KEY if kind == "redis" else "/events") in line
    assert "hush" not in line
