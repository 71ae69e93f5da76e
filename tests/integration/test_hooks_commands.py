"""`shiwu hooks …` and `shiwu-hooks --check` on a real Valkey, with a real receiver."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from standardwebhooks import Webhook

from shiwu.contract import RESULT_STREAM
from shiwu.hooks.delivery_queue import DeliveryQueue, NewDelivery, Payload, QueueOptions
from tests.support.hooks import SECRET, write_endpoints
from tests.support.processes import LOOPBACK, free_ports, run_module
from tests.support.webhook_receiver import Answered, WebhookReceiver


def run(*arguments: str, redis_url: str, module: str = "shiwu.cli", **env: str) -> tuple[int, str]:
    """Exit code and output of a command that may reach loopback."""
    environment = {"SHIWU_REDIS_URL": redis_url, "SHIWU_ALLOW_HOSTS": LOOPBACK, **env}
    done = run_module(module, *arguments, timeout_s=60, **environment)
    return done.returncode, done.stdout + done.stderr


def add(client: redis.Redis, *made: tuple[str, str, str]) -> DeliveryQueue:
    """Add deliveries as (endpoint, webhook id, reason why it is dead)."""
    if not client.exists(RESULT_STREAM):
        client.xgroup_create(RESULT_STREAM, "hooks", id="0", mkstream=True)
    client.xadd(RESULT_STREAM, {"id": "k", "answer": "{}"})
    [[_, [(entry_id, _)]]] = client.xreadgroup("hooks", "me", {RESULT_STREAM: ">"})
    queue = DeliveryQueue(client, QueueOptions())
    new = [
        NewDelivery(endpoint=endpoint, id=webhook_id, payload=Payload(1), body=b"{}", dead_reason=reason)
        for endpoint, webhook_id, reason in made
    ]
    assert queue.add(new, group="hooks", entry_ids=[entry_id.decode()]) == len(made)
    return queue


def test_dead_deliveries_are_listed_and_retried(redis_url: str, redis_client: redis.Redis) -> None:
    """By id, by endpoint, or all of them."""
    queue = add(redis_client, ("a", "k1.0", "too_old"), ("a", "k2.0", "http_500"), ("b", "k3.0", "timeout"))
    code, text = run("hooks", "list", redis_url=redis_url)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == ["webhook", "k3.0", "k2.0", "k1.0"]
    code, text = run("hooks", "list", "--endpoint", "a", "--limit", "1", "--json", redis_url=redis_url)
    shown = json.loads(text)
    assert (shown["webhook_id"], shown["reason"], shown["tries"], shown["answers"]) == ("k2.0", "http_500", 0, 1)
    code, text = run("hooks", "retry", "k1.0", "gone.0", redis_url=redis_url)
    assert (code, text) == (1, "k1.0\nshiwu: 1 of 2 ids are no dead deliveries, first gone.0\n")
    assert run("hooks", "retry", "--endpoint", "b", redis_url=redis_url) == (0, "k3.0\n")
    assert run("hooks", "retry", "--all", redis_url=redis_url) == (0, "k2.0\n")
    assert queue.pending(["a", "b"]) == {"a": 2, "b": 1}
    assert run("hooks", "retry", redis_url=redis_url)[0] == 2
    assert run("hooks", "retry", "x", "--all", redis_url=redis_url)[0] == 2


def test_status_shows_each_endpoint(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """Those of the file, those that something waits for, and those that failed."""
    queue = add(redis_client, ("gone", "k1.0", ""), ("bad", "k2.0", ""), ("bad", "k3.0", ""), ("old", "k4.0", ""))
    [gone], [bad, _] = queue.take("gone", count=1), queue.take("bad", count=2)
    queue.give_up(gone, reason="http_410", is_disabling=True)
    queue.retry(bad, reason="http_503", delay_s=9.0, pause_s=60.0)
    file = write_endpoints(tmp_path, [{"name": "idle", "url": "https://h.example/"}])
    code, text = run("hooks", "status", "--json", "--endpoints", str(file), redis_url=redis_url)
    assert code == 0
    shown: dict[str, Any] = json.loads(text)
    assert shown["dead"] == 1
    assert {each["endpoint"]: (each["state"], each["pending"], each["failures"]) for each in shown["endpoints"]} == {
        "bad": ("paused", 2, 1),
        "gone": ("disabled", 0, 1),
        "idle": ("ok", 0, 0),
        "old": ("ok", 1, 0),
    }
    text = run("hooks", "status", redis_url=redis_url)[1]
    assert re.search(r"^gone +disabled +0 +1 +http_410 20", text, re.M)
    assert text.endswith("dead deliveries: 1\n")


def test_test_sends_a_signed_delivery(redis_url: str, receiver: WebhookReceiver, tmp_path: Path) -> None:
    """And says what came of it, by the exit code too."""
    file = write_endpoints(tmp_path, [{"name": "a", "url": receiver.url}])
    code, text = run("hooks", "test", "a", redis_url=redis_url, SHIWU_HOOKS_FILE=str(file))
    [got] = receiver.received
    assert Webhook(SECRET).verify(got.body, dict(got.headers))["type"] == "test"
    assert (code, got.id in text, "HTTP 204" in text) == (0, True, True)
    receiver.behave = lambda _: Answered(503)
    assert run("hooks", "test", "a", "--endpoints", str(file), redis_url=redis_url)[0] == 1
    code, text = run("hooks", "test", "a", redis_url=redis_url, SHIWU_HOOKS_FILE=str(file), SHIWU_ALLOW_HOSTS="x")
    assert (code, "address_refused" in text, len(receiver.received)) == (1, True, 2)
    assert re.search(
        r"\(http://127\.0\.0\.1:(\d+): port \1 of 127\.0\.0\.1 is not one of SHIWU_FETCH_PORTS\)$", text.strip()
    ), text
    assert run("hooks", "test", "b", "--endpoints", str(file), redis_url=redis_url)[0] == 2
    assert run("hooks", "test", "a", redis_url=redis_url)[0] == 2
    assert run("hooks", "test", "a", "--endpoints", "gone.yaml", redis_url=redis_url)[0] == 64


def test_check_names_what_fails(redis_url: str, receiver: WebhookReceiver, tmp_path: Path) -> None:
    """Redis, and each endpoint without a request to it."""
    [closed] = free_ports(1)
    named = [
        {"name": "good", "url": f"{receiver.url}?token=hidden"},
        {"name": "closed", "url": f"http://{LOOPBACK}:{closed}/"},
        {"name": "forbidden", "url": f"http://127.0.0.2:{receiver.port}/"},
    ]
    file = write_endpoints(tmp_path, named, urls={"secret_file": "secret"})
    arguments = ("--check", "--endpoints", str(file))
    code, text = run(*arguments, redis_url=redis_url, module="shiwu.hooks")
    lines = [line.partition(" http")[0] for line in text.splitlines()]
    assert code == 64
    assert lines[:4] == [
        "redis: ok 0 dead deliveries",
        "endpoint good: ok",
        "endpoint closed: FAILED",
        "endpoint forbidden: FAILED",
    ]
    assert lines[4].startswith("urls: ok off")
    assert "hidden" not in text
    assert receiver.received == []
    good = write_endpoints(tmp_path, named[:1])
    assert run("--check", "--endpoints", str(good), redis_url=redis_url, module="shiwu.hooks")[0] == 0
    closed_url = f"redis://{LOOPBACK}:{closed}/0"
    assert run("--check", "--endpoints", str(good), redis_url=closed_url, module="shiwu.hooks")[0] == 64


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--endpoints", "gone.yaml"), 64, "expected a readable file"),
        (("--endpoints", "{file}", "--schedule", "5"), 64, "--schedule: expected pauses"),
        (("--endpoints", "{file}", "--lease", "10", "--timeout", "10"), 64, "--lease: expected more seconds"),
        (("--endpoints", "{file}", "--group", ""), 64, "--group: expected a text of 1 to 1000 characters"),
        (("--endpoints", "{file}", "--consumer", "x" * 1001), 64, "--consumer: expected a text of 1 to 1000"),
        (("--endpoints", "{file}", "--urls"), 64, "--urls: expected a section `urls`"),
        (("--endpoints", "{file}", "--redis-url", "x"), 64, "invalid_redis_url"),
        (("--endpoints", "{file}", "--threads", "0"), 2, "--threads"),
        ((), 2, "--endpoints"),
    ],
)
def test_wrong_option_ends_the_start(
    redis_url: str, tmp_path: Path, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    """With what was expected."""
    file = write_endpoints(tmp_path, [{"name": "a", "url": "https://h.example/"}])
    given = [each.replace("{file}", str(file)) for each in arguments]
    found, text = run(*given, redis_url=redis_url, module="shiwu.hooks")
    assert found == code, text
    assert expected in text
    assert "Traceback" not in text
