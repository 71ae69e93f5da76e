"""The same question of several producers is answered once, with both clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from shiwu import Client, RequestError, job_id_for
from shiwu.broker.answers import AnswerEntry
from shiwu.contract import RESULT_STREAM, Answer, ErrorCode, ErrorInfo, Lane, Stage, Status, result_key
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.both_clients import OpenClient
from tests.support.picture_server import PictureServer, Reply
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue

IMAGE = "s3://b/meme"


@pytest.fixture
def client(open_client: OpenClient, redis_url: str) -> Iterator[Client]:
    """Each of the two clients."""
    with open_client(redis_url) as connected:
        yield connected


def finish(client: redis.Redis) -> int:
    """Answer waiting jobs, as a worker does; how many it claimed."""
    jobs = make_lease_queue(client, "w").claim(1000).jobs
    make_answer_store(client, "w").write([answer(job) for job in jobs])
    return len(jobs)


def reject(client: redis.Redis) -> None:
    """Reject the job that waits, as a worker does."""
    [job] = make_lease_queue(client, "w").claim(1000).jobs
    error = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="gone", stage=Stage.FETCH)
    rejected = Answer(id=job.id, status=Status.REJECTED, attempts=1, error=error)
    message = job.key.encode() + b"|" + job.raw
    entry = AnswerEntry(id=job.id, answer=rejected, message=message, is_dead=True, generation=job.generation)
    make_answer_store(client, "w").write([entry])


def test_same_question_is_answered_once(client: Client, redis_client: redis.Redis) -> None:
    """For producers that do not know each other; their metadata does not count, their labels do."""
    ids = {client.enqueue(IMAGE, metadata={"post": number}, coalesce=True) for number in range(5)}
    ids |= set(client.enqueue_many([{"image": IMAGE, "metadata": number} for number in range(20)], coalesce=True))
    assert ids == {job_id_for(IMAGE)}
    other = client.enqueue(IMAGE, labels="six-zh", coalesce=True)
    assert finish(redis_client) == 2
    assert finish(redis_client) == 0
    assert redis_client.xlen(RESULT_STREAM) == 2
    assert client.wait_many([*ids, other], timeout_s=5).keys() == {*ids, other}
    assert client.enqueue(IMAGE, coalesce=True) in ids
    assert client.wait(job_id_for(IMAGE), timeout_s=0).ok, "the answer is kept"
    assert finish(redis_client) == 0


def test_items_with_an_id_keep_it(client: Client) -> None:
    """As with `id_from`; a single job has no id of its own."""
    assert list(client.enqueue_many([{"image": IMAGE, "id": "mine"}, IMAGE], coalesce=True)) == [
        "mine",
        job_id_for(IMAGE),
    ]
    with pytest.raises(RequestError, match="id: expected no id with coalesce"):
        client.enqueue(IMAGE, id="mine", coalesce=True)


def test_failure_is_the_answer_until_it_is_requeued(client: Client, redis_client: redis.Redis) -> None:
    """All who ask get it; another salt asks again without waiting for an operator."""
    job_id = client.enqueue(IMAGE, coalesce=True)
    reject(redis_client)
    assert client.enqueue(IMAGE, coalesce=True) == job_id
    assert finish(redis_client) == 0
    assert client.wait(job_id, timeout_s=1).status is Status.REJECTED
    again = client.enqueue(IMAGE, id=job_id_for(IMAGE, salt="1"))
    assert finish(redis_client) == 1
    assert client.wait(again, timeout_s=1).ok
    assert client.requeue(job_id) == [job_id]
    assert finish(redis_client) == 1
    assert client.wait(job_id, timeout_s=1).ok


def test_question_after_its_answer_was_dropped_is_refused(client: Client, redis_client: redis.Redis) -> None:
    """While the id still counts as answered."""
    job_id = client.enqueue(IMAGE, coalesce=True)
    finish(redis_client)
    redis_client.delete(result_key(job_id))
    client.enqueue(IMAGE, coalesce=True)
    finish(redis_client)
    found = client.wait(job_id, timeout_s=1).error
    assert found is not None
    assert found.code is ErrorCode.ALREADY_ANSWERED
    assert redis_client.llen(Lane.INTERACTIVE.queue) == 0


def test_worker_reads_a_shared_image_once(
    client: Client, start_worker: StartWorker, redis_url: str, http_server: PictureServer
) -> None:
    """With a real worker: 30 posts of three images are three requests to their server."""
    urls = [http_server.serve(f"/{n}.png", Reply.picture(pictures.png(pictures.picture()))) for n in range(3)]
    start_worker(redis_url=redis_url)
    ids = set(client.enqueue_many([urls[number % 3] for number in range(30)], coalesce=True))
    assert ids == {job_id_for(url) for url in urls}
    assert all(result.ok for result in client.wait_many(ids, timeout_s=60).values())
    assert [http_server.hits[f"/{n}.png"] for n in range(3)] == [1, 1, 1]
