"""Every caller gets an answer: jobs are cancelled, revoked or out of time, with and without workers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis
import structlog
from click.testing import CliRunner

from shiwu import Client, Status
from shiwu.cli import main
from shiwu.contract import CANVAS, CLAIMS, DEADLINES, LEASES, RESULT_STREAM, REVOKED, ErrorCode, Lane, done_key
from shiwu_worker.celery_worker.revoke import Revoker
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.both_clients import OpenClient
from tests.support.picture_server import PictureServer, Reply
from tests.support.redis_parts import answer, forget_mark, make_answer_store, make_lease_queue, make_maintenance
from tests.support.waiting import wait_until


@pytest.fixture
def client(open_client: OpenClient, redis_url: str) -> Iterator[Client]:
    """A producer's client."""
    with open_client(redis_url) as connected:
        yield connected


def test_cancelled_job_is_answered_and_never_claimed(client: Client, redis_client: redis.Redis) -> None:
    """The answer is `cancelled`; the message in the lane is dropped when it is claimed."""
    client.enqueue("s3://b/k.jpg", id="one")
    assert client.cancel(["one"], reason="upload was deleted") == ["one"]
    result = client.wait("one", timeout_s=1)
    assert (result.status, result.error and result.error.code) == (Status.CANCELLED, ErrorCode.CANCELLED)
    assert "upload was deleted" in (result.error.message if result.error else "")
    assert client.cancel("one") == []
    assert make_lease_queue(redis_client, "w").claim(5).jobs == ()


def test_cancel_of_a_claimed_job_discards_its_answer(client: Client, redis_client: redis.Redis) -> None:
    """The late answer of the worker is discarded and counted."""
    client.enqueue("s3://b/k.jpg", id="one")
    [job] = make_lease_queue(redis_client, "w").claim(5).jobs
    assert client.cancel("one") == ["one"]
    assert redis_client.hlen(CLAIMS) == redis_client.zcard(LEASES) == 0
    assert make_answer_store(redis_client, "w").write([answer(job)]) == {"one"}
    assert client.wait("one", timeout_s=1).status is Status.CANCELLED
    assert redis_client.xlen(RESULT_STREAM) == 1


def test_cancelled_job_in_loading_is_not_encoded(
    start_worker: StartWorker, redis_url: str, client: Client, http_server: PictureServer
) -> None:
    """A real worker is notified while it fetches the image, and uses no device time for it."""
    data = pictures.png(pictures.picture())
    slow = http_server.serve("/slow.png", Reply.picture(data).late(first_pause_s=2))
    worker = start_worker(redis_url=redis_url, env={"SHIWU_LOG_LEVEL": "debug"})
    client.enqueue(slow, id="slow")
    wait_until(lambda: client.queue_state().claimed[Lane.INTERACTIVE], timeout_s=10)
    client.cancel("slow")
    quick = http_server.serve("/quick.png", Reply.picture(data))
    assert client.tag(quick, id="quick", timeout_s=20).ok
    wait_until(lambda: sum(client.queue_state().claimed.values()) == 0, timeout_s=20)
    assert client.wait("slow", timeout_s=1).status is Status.CANCELLED
    lines = [json.loads(line) for line in worker.log_text().splitlines() if '"id": "slow"' in line]
    assert not any("encode_ms" in line for line in lines), lines


def test_revoke_of_a_waiting_job_is_remembered(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    """Celery's revoke names any id; the job is answered when it is claimed."""
    client.enqueue("s3://b/k.jpg", id="waiting")
    client.enqueue("s3://b/k.jpg", id="later", countdown_s=300)
    revoker = Revoker(redis_client, make_answer_store(redis_client, "revoke"))
    assert revoker.revoke(["waiting", "foreign"]) == 0
    taken = {job.id: job.is_revoked for job in make_lease_queue(redis_client, "w").claim(5).jobs}
    assert taken == {"waiting": True, "later": False}
    assert redis_client.zcard(REVOKED) == 2
    assert revoker.revoke(["waiting"]) == 1
    assert client.wait("waiting", timeout_s=1).status is Status.CANCELLED
    assert not redis_client.exists(done_key("foreign"))


def test_dropped_revokes_are_logged(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest revokes are dropped, as in Celery, and the log has their number."""
    monkeypatch.setattr("shiwu_worker.celery_worker.revoke.MAX_REMEMBERED", 10)
    revoker = Revoker(redis_client, make_answer_store(redis_client, "revoke"))
    with structlog.testing.capture_logs() as logs:
        revoker.revoke([f"old-{number}" for number in range(10)])
        assert logs == []
        revoker.revoke([f"new-{number}" for number in range(4)])
    assert [(line["event"], line["jobs"]) for line in logs] == [("revokes_dropped", 4)]
    assert redis_client.zcard(REVOKED) == 10


def test_answer_by_without_a_worker_is_kept_by_sweep(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    """A sweep answers `expired` when the time is over; the message in the lane is then dropped."""
    client.enqueue("s3://b/k.jpg", id="due", answer_by_s=0.3)
    client.enqueue("s3://b/k.jpg", id="patient", answer_by_s=300)

    def is_over() -> bool:
        seconds, micros = redis_client.time()
        return seconds * 1000 + micros / 1000 > (redis_client.zscore(DEADLINES, "due") or 0)

    # A sweep at that very moment may meet the message in its lane first, where it counts as expired.
    wait_until(is_over, timeout_s=10, what="the end of its time")
    assert client.sweep().out_of_time == 1
    assert client.wait("due", timeout_s=1).status is Status.EXPIRED
    assert client.answer("patient") is None
    assert redis_client.zrange(DEADLINES, 0, -1) == [b"patient"]
    assert [job.id for job in make_lease_queue(redis_client, "w").claim(5).jobs] == ["patient"]


def test_answer_by_is_kept_while_a_worker_is_busy(
    start_worker: StartWorker, redis_url: str, client: Client, http_server: PictureServer
) -> None:
    """A worker answers for an image that it is still fetching."""
    slow = http_server.serve("/slow.png", Reply.picture(pictures.png(pictures.picture())).late(first_pause_s=8))
    start_worker(redis_url=redis_url)
    client.enqueue(slow, id="slow", answer_by_s=1.5)
    result = client.wait("slow", timeout_s=60)
    assert result.status is Status.EXPIRED
    assert (result.error.code if result.error else None) is ErrorCode.EXPIRED


def test_sweep_answers_expired_messages(client: Client, redis_client: redis.Redis) -> None:
    """The sweep removes them from the lane; the others keep their order."""
    for number in range(30):
        expires_s = 0.001 if number % 3 == 0 else None
        client.enqueue(
            "s3://b/k.jpg", id=f"j{number}", lane="bulk", expires_s=expires_s, metadata=number, callback="orders"
        )
    wait_until(lambda: make_maintenance(redis_client).expire_waiting(portion=7) == 0, timeout_s=5)
    expired = [client.wait(f"j{n}", timeout_s=1) for n in range(0, 30, 3)]
    assert {result.status for result in expired} == {Status.EXPIRED}
    assert [(result.metadata, result.callback) for result in expired] == [(n, "orders") for n in range(0, 30, 3)]
    assert redis_client.hlen(CLAIMS) == 0
    left = [job.id for job in make_lease_queue(redis_client, "w").claim(50).jobs]
    assert left == [f"j{n}" for n in range(30) if n % 3]


def test_cli_sweep_requeues_jobs_and_prints_json(client: Client, redis_client: redis.Redis, redis_url: str) -> None:
    """Jobs of a crashed worker are requeued, and the queue sizes are printed as JSON."""
    client.enqueue("s3://b/k.jpg", id="one")
    make_lease_queue(redis_client, "dead", lease_s=0.0).claim(1)
    result = CliRunner().invoke(main, ["--redis-url", redis_url, "sweep", "--once"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    assert printed["swept"]["reaped"] == 1
    assert printed["queues"]["waiting"]["interactive"] == 1
    assert [job.attempt for job in make_lease_queue(redis_client, "w").claim(1).jobs] == [2]


def test_sweep_skips_no_expired_message(client: Client, redis_client: redis.Redis) -> None:
    """Messages that are removed make the others move up; none is skipped."""
    images = [f"s3://b/{number}" for number in range(3000)]
    list(client.enqueue_many(images, expires_s=0.0))
    client.enqueue("s3://b/k.jpg", lane="bulk", id="stays")
    wait_until(lambda: client.sweep().expired == 3000, timeout_s=10)
    assert redis_client.llen(Lane.BULK.queue) == 1


def test_sweeps_check_long_lanes_part_by_part(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sweep checks a limited number and reports the rest; the next one continues there."""
    monkeypatch.setattr("shiwu.broker.maintenance.CHUNK_SIZE", 10)
    monkeypatch.setattr("shiwu.broker.maintenance.MAX_CHECKED", 20)
    list(client.enqueue_many([f"s3://b/{number}" for number in range(50)]))
    client.enqueue("s3://b/k.jpg", lane="bulk", id="late", expires_s=0.0)
    list(client.enqueue_many([f"s3://b/{number}" for number in range(9)]))
    rounds = [client.sweep() for _ in range(3)]
    assert [(report.expired, report.not_looked_at) for report in rounds] == [(0, 40), (0, 40), (1, 40)]
    assert client.wait("late", timeout_s=1).status is Status.EXPIRED
    make_lease_queue(redis_client, "w").claim(30)
    assert [client.sweep().not_looked_at for _ in range(3)] == [9, 20, 9]


def test_sweep_drops_cancelled_messages_of_unserved_lanes(
    open_client: OpenClient, redis_client: redis.Redis, redis_url: str
) -> None:
    """No worker serves the lane for as long as the mark lives: the job is not worked on afterwards."""
    with open_client(redis_url) as client:
        ids = [client.enqueue("s3://b/k.jpg", lane="bulk") for _ in range(3)]
        client.cancel(ids[1])
        client.sweep()
        assert client.sweep().expired == 0
    forget_mark(redis_client, ids[1])  # as when it has expired
    jobs = make_lease_queue(redis_client, "w").claim(10).jobs
    assert [job.id for job in jobs] == [ids[0], ids[2]]
    assert redis_client.hkeys(CANVAS) == [ids[1].encode()]
