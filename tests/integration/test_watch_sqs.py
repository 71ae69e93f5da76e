"""`shiwu watch sqs://…` against moto's server, a queue of SQS behind HTTP on loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis
from moto.server import ThreadedMotoServer

from shiwu.contract import WATCH_UNREAD
from shiwu.watch.sources import sqs
from shiwu.watch.sources.base import SourceUnavailable, SourceWrong
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import LOOPBACK
from tests.support.waiting import wait_until
from tests.support.watch import lines, record, run_watch, total, waiting_jobs, watch_process, write_rules

DATA = Path(__file__).parents[1] / "unit" / "watch" / "data"
LOGIN = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def endpoint_url() -> Iterator[str]:
    """The server."""
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client(endpoint_url: str) -> Iterator[Any]:
    """A plain client of the server."""
    made: Any = boto3.client("sqs", endpoint_url=endpoint_url)
    yield made
    made.close()


@pytest.fixture
def queue_url(client: Any, endpoint_url: str) -> Iterator[str]:
    """A new queue, by its URL at the server."""
    url = client.create_queue(QueueName="uploads", Attributes={"VisibilityTimeout": "30"})["QueueUrl"]
    yield f"{endpoint_url}{url[url.index('/', len('https://')) :]}"
    client.delete_queue(QueueUrl=url)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The file of rules."""
    return write_rules(tmp_path)


def send(client: Any, url: str, *bodies: str) -> None:
    """Messages, ten at a time."""
    for start in range(0, len(bodies), 10):
        entries = [{"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies[start : start + 10])]
        client.send_message_batch(QueueUrl=url, Entries=entries)


def counts(client: Any, url: str) -> tuple[int, int]:
    """How many messages are visible and how many are hidden."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return int(found[names[0]]), int(found[names[1]])


def event(key: str) -> str:
    """A message of S3 with one record."""
    return json.dumps({"Records": [record(key)]})


def drain(redis_url: str, url: str, rules: Path) -> list[dict[str, Any]]:
    """Empty the queue."""
    result = run_watch(redis_url, f"sqs://{url}", "--rules", str(rules), "--once")
    assert result.exit_code == 0, result.output
    return lines(result.stdout)


def test_recorded_messages_become_jobs(
    redis_url: str, redis_client: redis.Redis, client: Any, queue_url: str, rules: Path
) -> None:
    """S3's, also through SNS and EventBridge; test events and deletions are counted, and all are deleted."""
    names = ["s3_sqs", "s3_test", "sns", "eventbridge", "eventbridge_deleted"]
    send(client, queue_url, *((DATA / f"{name}.json").read_text(encoding="utf-8") for name in names))
    counted = drain(redis_url, queue_url, rules)
    assert [total(counted, name) for name in ("messages", "enqueued", "removed", "test")] == [5, 3, 2, 1]
    images = {image for _, image in waiting_jobs(redis_client)}
    keys = ["in/red flower + 猫.jpg", "in/copy.jpg", "in/red flower + 100%2B 猫.jpg"]
    assert images == {f"s3://photos/{key}" for key in keys}
    assert counts(client, queue_url) == (0, 0)


def test_many_messages_are_taken_in_portions(
    redis_url: str, redis_client: redis.Redis, client: Any, queue_url: str, rules: Path
) -> None:
    """Of more than the ten that one call of SQS gives."""
    send(client, queue_url, *(event(f"{number}.jpg") for number in range(60)))
    counted = drain(redis_url, queue_url, rules)
    assert counted[0]["messages"] == 60
    assert len(waiting_jobs(redis_client)) == 60
    assert counts(client, queue_url) == (0, 0)


def test_poison_message_is_kept_and_deleted(
    redis_url: str, redis_client: redis.Redis, client: Any, queue_url: str, rules: Path
) -> None:
    """It does not come again."""
    send(client, queue_url, "no JSON at all", event("a.jpg"))
    counted = drain(redis_url, queue_url, rules)
    assert (total(counted, "unread"), total(counted, "enqueued")) == (1, 1)
    assert counts(client, queue_url) == (0, 0)
    [kept] = [json.loads(line) for line in redis_client.lrange(WATCH_UNREAD, 0, -1)]  # type: ignore[union-attr]  # redis' own
    assert (kept["body"], kept["source"]) == ("no JSON at all", f"sqs://{queue_url}")


def test_kill_before_the_deletion_loses_nothing(
    redis_client: redis.Redis, redis_url: str, client: Any, queue_url: str, rules: Path
) -> None:
    """The message is enqueued and the queue hangs; it is visible again after its time, and has the same id then."""
    with FaultProxy(queue_url) as queue, FaultProxy(redis_url) as lanes:
        address = f"sqs://http://{queue.url.removeprefix('redis://').removesuffix('/0')}/123456789012/uploads"
        with watch_process(lanes.url, address, folder=rules.parent, env=LOGIN) as watch:
            send(client, queue_url, event("first.jpg"))
            wait_until(lambda: waiting_jobs(redis_client), timeout_s=60, what="a watcher at work")
            lanes.refuse()
            send(client, queue_url, event("a.jpg"))
            wait_until(lambda: counts(client, queue_url) == (0, 1), timeout_s=30, what="a message that was taken")
            queue.black_hole()
            lanes.heal()
            wait_until(lambda: len(waiting_jobs(redis_client)) == 2, timeout_s=30, what="its job")
            watch.kill()
    assert counts(client, queue_url) == (0, 1)
    send(client, queue_url, event("a.jpg"))  # SQS may deliver a message twice as well
    drain(redis_url, queue_url, rules)
    jobs = waiting_jobs(redis_client)
    assert [image for _, image in jobs] == [f"s3://photos/{name}.jpg" for name in ("first", "a", "a")]
    assert len(set(jobs)) == 2


def test_message_stays_hidden_while_its_job_waits(client: Any, queue_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is extended, and ends when it is given back."""
    monkeypatch.setattr(sqs, "VISIBILITY_S", 2)
    monkeypatch.setattr(sqs, "EXTEND_EVERY_S", 0.0)
    send(client, queue_url, event("a.jpg"))
    source = sqs.Sqs(queue_url)
    taken = source.take(1, wait_s=1)
    began: Any = client.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["All"])
    assert began["Attributes"]["VisibilityTimeout"] == "30"
    monkeypatch.setattr(sqs, "VISIBILITY_S", 60)
    source.keep(taken)
    received = client.receive_message(QueueUrl=queue_url, WaitTimeSeconds=3)
    assert "Messages" not in received
    source.give_back(taken)
    assert counts(client, queue_url) == (1, 0)
    again = source.take(1, wait_s=1)
    source.done(again)
    assert counts(client, queue_url) == (0, 0)
    source.close()


def test_queue_is_found_by_its_name(
    client: Any, queue_url: str, endpoint_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the endpoint of the AWS configuration."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", endpoint_url)
    send(client, queue_url, event("a.jpg"))
    source = sqs.Sqs("uploads")
    assert source.check() == "about 1 messages wait"
    source.close()
    with pytest.raises(SourceWrong, match=r"sqs://gone: .*NonExistentQueue"):
        sqs.Sqs("gone").check()


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("uploads", ("", None, None)),
        (
            "sqs.eu-west-1.amazonaws.com/123/uploads",
            ("https://sqs.eu-west-1.amazonaws.com/123/uploads", "eu-west-1", None),
        ),
        (
            "https://sqs.cn-north-1.amazonaws.com.cn/123/uploads",
            ("https://sqs.cn-north-1.amazonaws.com.cn/123/uploads", "cn-north-1", None),
        ),
        ("http://127.0.0.1:9324/000/q", ("http://127.0.0.1:9324/000/q", None, "http://127.0.0.1:9324")),
    ],
)
def test_address_of_a_queue_is_read(address: str, place: tuple[str, str | None, str | None]) -> None:
    """A name, or a URL with or without its scheme; the region is that of the host."""
    assert sqs._place(address) == place


def test_missing_login_is_told(queue_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a server that does not answer is waited for."""
    for name in LOGIN:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SourceWrong, match="Set AWS_REGION and credentials"):
        sqs.Sqs(queue_url).check()
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1:1"):
        sqs.Sqs("http://127.0.0.1:1/123456789012/q").check()
