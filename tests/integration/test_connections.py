"""One client in many threads, green threads, forked processes and asyncio; its connections are limited."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from shiwu import Client
from shiwu.broker.connection import connect, run_on_connection
from shiwu.broker.redis_errors import NotReplicated
from tests.support.both_clients import OpenClient
from tests.support.processes import Process, clean_environment
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

THREADS = 150
GEVENT = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
from shiwu import Client

with Client(sys.argv[1], max_connections=20) as client:
    def tag_one(number):
        job_id = client.enqueue("s3://b/k", id=f"green-{number}")
        return client.wait(job_id, timeout_s=60).ok
    tasks = [gevent.spawn(tag_one, number) for number in range(150)]
    gevent.joinall(tasks, raise_error=True)
    print(sum(task.value for task in tasks))
"""
FORK = """
import os, sys, threading
from shiwu import Client

with Client(sys.argv[1]) as client:
    client.enqueue("s3://b/k", id="before")
    assert client.wait("before", timeout_s=60).ok
    answers = []
    listening = threading.Thread(target=lambda: answers.append(client.wait("after", timeout_s=60)))
    listening.start()
    mine = client._redis[0].client_id()
    child = os.fork()
    if child == 0:
        done = client.enqueue("s3://b/k", id="child") and client.wait("child", timeout_s=60).ok
        os._exit(0 if done and client._redis[0].client_id() != mine else 1)
    _, status = os.waitpid(child, 0)
    assert client._redis[0].client_id() == mine, "the child has closed a connection of its parent"
    client.enqueue("s3://b/k", id="after")
    listening.join()
    print(int(status == 0 and answers[0].ok))
"""
ASYNCIO = """
import asyncio, sys
from shiwu import Client

async def main(client):
    def tag_one(number):
        return client.wait(client.enqueue("s3://b/k", id=f"async-{number}"), timeout_s=60).ok
    print(sum(await asyncio.gather(*[asyncio.to_thread(tag_one, number) for number in range(150)])))

with Client(sys.argv[1], max_connections=4) as client:
    asyncio.run(main(client))
"""


@contextmanager
def answering(client: redis.Redis) -> Iterator[None]:
    """Answers every job that is enqueued, as a worker does."""
    stopped = threading.Event()
    claims, committer = make_lease_queue(client, "w"), make_answer_store(client, "w")

    def work() -> None:
        while not stopped.wait(0.02):
            committer.write([answer(job) for job in claims.claim(1000).jobs])

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            stopped.set()
        working.result(timeout=10)


@pytest.mark.parametrize("max_connections", [64, 8])
def test_client_serves_more_threads_than_connections(
    redis_url: str, redis_client: redis.Redis, max_connections: int
) -> None:
    """150 threads enqueue, wait and count; those without a connection wait for one, or poll."""
    before = len(redis_client.client_list())
    most = 0
    begin = threading.Barrier(THREADS)

    def tag_one(client: Client, number: int) -> bool:
        begin.wait(30)
        job_id = client.enqueue("s3://b/k", id=f"job-{number}")
        client.queue_state()
        return client.wait(job_id, timeout_s=60).ok

    with (
        Client(redis_url, max_connections=max_connections) as client,
        ThreadPoolExecutor(THREADS) as pool,
        answering(redis_client),
    ):
        tasks = [pool.submit(tag_one, client, number) for number in range(THREADS)]
        while not all(task.done() for task in tasks):
            most = max(most, len(redis_client.client_list()) - before)
        assert [task.result() for task in tasks] == [True] * THREADS
    own = 3  # of this test's client, for its two threads, and one whose end the server has not seen yet
    assert most <= 3 * max_connections + own


@pytest.mark.parametrize(
    ("code", "count"), [(GEVENT, THREADS), (FORK, 1), (ASYNCIO, THREADS)], ids=["gevent", "fork", "asyncio"]
)
def test_client_works_with_other_concurrency(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, code: str, count: int
) -> None:
    """With green threads, forked processes and asyncio; a forked process opens its own connections."""
    command = [sys.executable, "-c", code, redis_url]
    process = Process(command, name="script", folder=tmp_path, env=clean_environment({}))
    with answering(redis_client), process:
        assert process.wait(timeout_s=90) == 0, process.log_text()
    assert process.log_text() == f"{count}\n"


def test_enqueue_with_replicas_waits_for_confirmation(
    open_client: OpenClient, replicated: tuple[RedisServer, RedisServer]
) -> None:
    """A replica that hangs with an open connection confirms nothing, and the caller gets an error."""
    primary, replica = replicated
    with open_client(primary.url, timeout_s=2) as client:
        client.enqueue("s3://b/k", id="one", answer_by_s=60, replicas=1)
        replica.pause()
        try:
            with pytest.raises(NotReplicated):
                client.enqueue("s3://b/k", id="two", answer_by_s=60, replicas=1)
        finally:
            replica.resume()
        client.enqueue("s3://b/k", id="two", answer_by_s=60, replicas=1)
        assert sum(client.queue_state().waiting.values()) == 3


def test_transaction_on_a_connection_is_atomic(redis_url: str, redis_client: redis.Redis) -> None:
    """A command that cannot be queued, or fails, raises an error and leaves the connection usable."""
    redis_client.set("text", "x")
    with connect(redis_url, timeout_s=5) as client, client.client() as connection:  # type: ignore[no-untyped-call]  # redis' own
        assert run_on_connection(connection, ("SET", "a", 1), ("GET", "a")) == [b"OK", b"1"]
        with pytest.raises(redis.ResponseError):
            run_on_connection(connection, ("SET", "b", 1), ("NO-SUCH-COMMAND",))
        assert redis_client.get("b") is None
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            run_on_connection(connection, ("SET", "b", 1), ("LPUSH", "text", 1))
        assert run_on_connection(connection, ("GET", "a")) == [b"1"]


def test_wait_without_a_free_listener_polls(redis_url: str, redis_client: redis.Redis) -> None:
    """One thread waits and holds the only connection that listens; another still gets its answer."""
    with Client(redis_url, max_connections=1) as client, ThreadPoolExecutor(2) as pool:
        held = pool.submit(lambda: list(client.as_answered(["never"], timeout_s=30)))
        wait_until(lambda: redis_client.pubsub_numsub("celery-task-meta-never")[0][1] == 1, timeout_s=10)
        client.enqueue("s3://b/k", id="job")
        waiting = pool.submit(client.wait, "job", timeout_s=20)
        with answering(redis_client):
            assert waiting.result(timeout=10).ok
        assert not held.done()
        client.cancel("never")
        held.result(timeout=10)
