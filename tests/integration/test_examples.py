"""The examples of the documents, run as their users run them: with a real S3 store, Redis and worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import urllib3

from shiwu import Client
from shiwu.contract import RESULT_STREAM
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.processes import LOOPBACK, ROOT, Process, clean_environment, free_ports
from tests.support.servers import S3Server, WorkerProcess
from tests.support.waiting import wait_until

EXAMPLES: Final = ROOT / "docs/examples"


@dataclass(frozen=True)
class WebApp:
    """The web application, as a browser sees it."""

    url: str

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON of a reply."""
        with urllib3.PoolManager(timeout=60, retries=False) as pool:
            reply = pool.request(method, f"{self.url}{path}", body=body)
        return reply.status, json.loads(reply.data)


@pytest.fixture
def web_app(redis_url: str, s3: S3Server, tmp_path: Path) -> Iterator[WebApp]:
    """The application in a process of its own."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "web_app:app", "--app-dir", str(EXAMPLES), "--port", str(port)]
    own = {"SHIWU_REDIS_URL": redis_url, "SHOP_BUCKET": s3.bucket, "SHOP_S3_ENDPOINT_URL": s3.endpoint_url}
    with Process(command, name="web-app", folder=tmp_path, env=clean_environment(s3.env | own)) as process:
        wait_until(lambda: "startup complete" in process.log_text() or not process.is_running, timeout_s=60)
        assert process.is_running, process.log_text()
        yield WebApp(f"http://{LOOPBACK}:{port}")


@pytest.fixture
def worker(start_worker: StartWorker, redis_url: str, s3: S3Server) -> WorkerProcess:
    """A worker that reads the store, and allows what the Celery application wants to follow."""
    return start_worker(redis_url=redis_url, env=s3.env, callback_tasks="shop.save_tags,shop.note_failure")


def test_upload_is_answered_with_its_tags(web_app: WebApp, worker: WorkerProcess, redis_client: redis.Redis) -> None:
    """The same upload again is the same job; what is no image is refused, with the reason."""
    image = pictures.jpeg(pictures.picture("熊猫"))
    replies = [web_app.ask("POST", "/images?wait_s=30", image) for _ in range(2)]
    assert [status for status, _ in replies] == [200, 200], replies
    first, second = (answer for _, answer in replies)
    assert first == second
    assert first["tags"]
    assert redis_client.xlen(RESULT_STREAM) == 1
    assert web_app.ask("GET", f"/images/{first['id']}") == (200, first)
    status, answer = web_app.ask("POST", "/images?wait_s=30", b"no image")
    assert (status, answer["error"]["stage"]) == (422, "decode")
    assert web_app.ask("POST", "/images")[0] == 400


def test_upload_without_a_worker_is_accepted(web_app: WebApp, redis_url: str) -> None:
    """The caller gets an id to ask for later."""
    status, reply = web_app.ask("POST", "/images?wait_s=0.1", pictures.jpeg(pictures.picture("汽车")))
    assert status == 202
    assert web_app.ask("GET", f"/images/{reply['id']}") == (202, reply)
    with Client(redis_url) as client:
        assert client.cancel(reply["id"]) == [reply["id"]]
    status, answer = web_app.ask("GET", f"/images/{reply['id']}")
    assert (status, answer["status"]) == (503, "cancelled")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Celery's own use of redis
def test_celery_task_gets_the_tags_of_an_image(
    worker: WorkerProcess, redis_url: str, s3: S3Server, tmp_path: Path
) -> None:
    """One task enqueues, and another gets the answer, or the reason for which there is none."""
    image = s3.put("shop/panda.jpg", pictures.jpeg(pictures.picture("熊猫")))
    command = [sys.executable, "-m", "celery", "-A", "celery_tasks", "--workdir", str(EXAMPLES)]
    env = clean_environment({"SHOP_REDIS_URL": redis_url})
    with (
        Process(
            [*command, "worker", "-Q", "celery", "-P", "solo", "-l", "INFO"], name="shop", folder=tmp_path, env=env
        ) as shop,
        celery_client(redis_url) as app,
    ):
        wait_until(lambda: "ready." in shop.log_text() or not shop.is_running, timeout_s=60)
        app.send_task("shop.publish", args=["tea-cup", image])
        app.send_task("shop.publish", args=["old-lamp", "s3://pictures/shop/missing.jpg"])
        wait_until(lambda: "tea-cup is tagged" in shop.log_text(), timeout_s=60, what=shop.log_text())
        wait_until(lambda: "old-lamp has no tags" in shop.log_text(), timeout_s=60, what=shop.log_text())
