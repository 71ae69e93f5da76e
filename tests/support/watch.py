"""Bucket events and watchers for tests of `shiwu watch`."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import redis
from click.testing import CliRunner, Result

from shiwu.cli import main
from shiwu.contract import Lane
from tests.support.processes import Process, clean_environment

KEY = "bucketevents"
RULES = """
- match: {bucket: photos, prefix: urgent/}
  lane: interactive
  labels: [猫, 狗]
- match: {bucket: photos, suffix: [.jpg, .png]}
"""


def record(key: str, *, bucket: str = "photos", name: str = "ObjectCreated:Put", number: int = 1) -> dict[str, Any]:
    """One record, as of S3; MinIO's has `s3:` before its name."""
    inner = {"bucket": {"name": bucket}, "object": {"key": quote_plus(key), "eTag": "e", "sequencer": f"{number:016X}"}}
    return {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": name, "s3": inner}


def access_event(key: str, **fields: Any) -> bytes:
    """What MinIO pushes to its list."""
    time = "2026-11-30T09:12:44.123Z"
    inner = record(key, **fields)
    inner["eventName"] = f"s3:{inner['eventName']}"
    return json.dumps([{"Event": [inner], "EventTime": time}]).encode()


def write_rules(folder: Path, text: str = RULES) -> Path:
    """A file of rules."""
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def run_watch(redis_url: str, *args: str) -> Result:
    """`shiwu watch` in this process, for commands that end by themselves."""
    return CliRunner().invoke(main, ["--redis-url", redis_url, "watch", *args])


def watch_process(
    redis_url: str, source: str, *args: str, folder: Path, name: str = "watch", env: dict[str, str] | None = None
) -> Process:
    """A watcher as a process of its own, with the file of rules in `folder`."""
    rules = folder / "rules.yaml"
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", redis_url, "watch", source, "--rules", str(rules)]
    return Process([*command, *args], name=name, folder=folder, env=clean_environment(env or {}))


def lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of a watcher."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def total(counts: Sequence[dict[str, Any]], name: str) -> int:
    """The sum of one count over the lines."""
    return sum(line.get(name, 0) for line in counts)


def waiting_jobs(client: redis.Redis, lane: Lane = Lane.BULK) -> list[tuple[str, str]]:
    """Id and image of each message in a lane, oldest first."""
    found: Any = client.lrange(lane.queue, 0, -1)
    messages = [json.loads(raw) for raw in reversed(found)]
    return [(each["headers"]["id"], json.loads(base64.b64decode(each["body"]))[1]["image"]) for each in messages]


def source(url: str, *, ending: str = "") -> str:
    """The address of the events."""
    return f"{url}?key={KEY}{ending}"


def drain(url: str, rules: Path, *args: str) -> list[dict[str, Any]]:
    """Empty the source and return the lines about it."""
    result = run_watch(url, source(url), "--rules", str(rules), "--once", *args)
    assert result.exit_code == 0, result.output
    return lines(result.stdout)


def push(client: redis.Redis, *keys: str, **fields: Any) -> None:
    """Events of MinIO's access format."""
    client.rpush(KEY, *(access_event(key, **fields) for key in keys))
