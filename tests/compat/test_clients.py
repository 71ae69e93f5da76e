"""Messages as the clients of other languages write them, all through one real worker, each answered under its own id.

`golden/*.json` hold one message each: `text` as the client writes it, `body` decoded for people, `how` it comes about
and its `source`. Golden messages are only added.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from shiwu import Client, JobFailed
from shiwu.contract import Lane, result_key
from tests.compat.shapes import shapes
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.servers import S3Server, WorkerProcess
from tests.support.waiting import wait_until

# Celery's client leaves the sockets of its result consumer to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GOLDEN = {path.stem: json.loads(path.read_text("utf-8")) for path in Path(__file__).parent.glob("golden/*.json")}
IMAGE = "s3://pictures/compat/panda.png"
SHAPES = shapes(IMAGE, prefix="compat-")


@pytest.fixture(scope="module")
def url(shared_worker: WorkerProcess, s3: S3Server) -> str:
    """The Redis of a real worker that can fetch the image of the golden messages."""
    assert s3.put("compat/panda.png", pictures.png(pictures.picture("熊猫"))) == IMAGE
    return shared_worker.redis_url


def ask(client: redis.Redis, raw: bytes, job_id: str) -> dict[str, Any]:
    """Send a message and wait for the value under the key where its client looks."""
    client.lpush(Lane.INTERACTIVE.queue, raw)
    found: Any = wait_until(lambda: client.get(result_key(job_id)), timeout_s=30, what=f"an answer of {job_id!r:.60}")
    meta: dict[str, Any] = json.loads(found)
    assert set(meta) == {"status", "result", "traceback", "children", "date_done", "task_id"}
    assert (meta["task_id"], meta["traceback"], meta["children"]) == (job_id, None, [])
    assert datetime.fromisoformat(meta["date_done"]).tzinfo is not None
    return meta


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_message_is_answered_under_its_id(url: str, name: str) -> None:
    """Celery 4 and 5 with both protocols, celery.node, gocelery, rusty-celery, celery-php."""
    golden = GOLDEN[name]
    assert base64.b64decode(json.loads(golden["text"])["body"]).decode() == golden["body"]
    with redis.Redis.from_url(url) as client:
        meta = ask(client, golden["text"].encode(), golden["id"])
    assert meta["status"] == "SUCCESS"
    assert (meta["result"]["id"], meta["result"]["status"]) == (golden["id"], "tagged")
    assert meta["result"]["tags"][0]["label"] == "熊猫"
    assert len(meta["result"]["tags"]) == 2, "the labels of the message"


@pytest.mark.parametrize("name", SHAPES)
def test_unusual_message_is_answered_under_its_id(url: str, name: str) -> None:
    """Unusual ids, places of the id, bodies and sizes: the clients of shiwu and Celery find the answer."""
    raw, job_id, outcome = SHAPES[name]
    with redis.Redis.from_url(url) as client, Client(url) as ours:
        meta = ask(client, raw, job_id)
        result = ours.wait(job_id, timeout_s=5)
        letter = ours.dead_letter(job_id)
    assert result.id == job_id
    if outcome == "tagged":
        assert (meta["status"], meta["result"]["id"], result.ok, letter) == ("SUCCESS", job_id, True, None)
    else:
        assert result.error is not None
        assert (meta["status"], result.error.code, letter is not None) == ("FAILURE", outcome, True)
        assert meta["result"]["exc_message"][0].startswith(outcome)


def test_celery_reads_answers_under_unusual_ids(url: str) -> None:
    """`AsyncResult.get()` returns the answer, or raises the reason why there is none."""
    raws = {name: SHAPES[name] for name in ("id 2", "id 3", "number", "protocol 1", "256 bytes")}
    with celery_client(url) as app, redis.Redis.from_url(url) as client:
        for number, (raw, job_id, outcome) in enumerate(raws.values()):
            ask(client, raw, job_id)
            result = app.AsyncResult(job_id)
            if outcome == "tagged":
                assert result.get(timeout=10)["id"] == job_id, number
            else:
                with pytest.raises(JobFailed, match=outcome):
                    result.get(timeout=10)


@pytest.mark.parametrize("protocol", [1, 2])
def test_golden_messages_match_the_installed_celery(redis_url: str, protocol: int) -> None:
    """The installed Celery writes the same fields in the same order as the golden message of its version."""
    golden = GOLDEN[f"celery-5-protocol-{protocol}"]
    app = Celery("plain", broker=redis_url, set_as_current=False)
    app.conf.task_protocol = protocol
    body = json.loads(golden["body"])
    args, kwargs = (body["args"], body["kwargs"]) if protocol == 1 else body[:2]
    app.send_task("shiwu.tag", args=args, kwargs=kwargs, queue="shiwu.interactive", task_id=golden["id"])
    app.close()
    with redis.Redis.from_url(redis_url) as client:
        sent: Any = client.lpop("shiwu.interactive")
    ours, celerys = json.loads(golden["text"]), json.loads(sent)
    assert base64.b64decode(celerys["body"]).decode() == golden["body"]
    assert list(celerys) == list(ours)
    assert list(celerys["headers"]) == list(ours["headers"])
    assert list(celerys["properties"]) == list(ours["properties"])
