"""A Redis that answers, and says no: full, read-only, a changed password. Nothing is lost; every try has a pause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis

from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.contract import CLAIMS, LEASES, RESULT_STREAM
from shiwu_worker.jobs.job import Release
from tests.support import drill, pictures
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue, make_maintenance, message
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

AWAY = '"event": "redis_unavailable"'
REFUSED = '"event": "redis_refused"'


@dataclass(frozen=True)
class Moody:
    """A server whose mood changes, a worker on it, and a picture that it may read."""

    client: redis.Redis
    worker: WorkerProcess
    url: str
    image: str

    def ask(self, count: int, *, prefix: str) -> list[str]:
        """Enqueue so many pictures."""
        with Client(self.url) as client:
            return list(client.enqueue_many([{"image": self.image, "id": f"{prefix}-{n}"} for n in range(count)]))


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moody]:
    """One for the tests of this file; each leaves it in a good mood."""
    folder = tmp_path_factory.mktemp("moody")
    (folder / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    options = {"max_batch": 8, "loaders": 1, "loader_spares": 0, "torch_threads": 1, "redis_timeout_s": 2, "lease_s": 3}
    with (
        Valkey(folder=folder / "valkey") as server,
        server.client() as client,
        WorkerProcess(redis_url=server.url, folder=folder, allow_folders=folder, **options) as worker,
    ):
        yield Moody(client, worker.wait_ready(), server.url, (folder / "x.png").as_uri())


@pytest.fixture
def near(valkey: Valkey) -> Iterator[redis.Redis]:
    """A client of a server of the test's own."""
    with valkey.client() as client:
        yield client


def all_answered_once(client: redis.Redis, ids: list[str]) -> None:
    """Wait for the answers and count them by id."""
    drill.wait_answered(client, ids, timeout_s=40)
    answered = [fields[b"id"].decode() for _, fields in client.xrange(RESULT_STREAM)]
    assert sorted(job_id for job_id in answered if job_id in set(ids)) == sorted(ids)
    wait_until(lambda: not client.exists(CLAIMS, LEASES), timeout_s=10)


def test_a_full_server_takes_answers_and_refuses_new_jobs(valkey: Valkey, near: redis.Redis) -> None:
    """`OOM command not allowed`: producers are told; claims, renewals, retries and commits go on."""
    near.lpush("shiwu.bulk", *[message(f"job-{n}") for n in range(50)])
    claims, committer = make_lease_queue(near, "w"), make_answer_store(near, "w")
    near.config_set("maxmemory", 1_000_000)
    near.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(redis.OutOfMemoryError), Client(valkey.url) as client:
        client.enqueue("s3://b/k.jpg")
    jobs = claims.claim(50).jobs
    assert len(jobs) == 50
    assert claims.renew([job.id for job in jobs]) == []
    assert claims.release([Release(jobs[0].id, delay_s=0.001, counts=True)]) == 1
    wait_until(lambda: make_maintenance(near).run_once().promoted, timeout_s=10)
    assert [job.id for job in claims.claim(50, held=[job.id for job in jobs[1:]]).jobs] == [jobs[0].id]
    assert committer.write([answer(job) for job in jobs]) == set()
    near.config_set("maxmemory", 0)
    all_answered_once(near, [f"job-{n}" for n in range(50)])


def test_a_primary_that_is_demoted_and_comes_back(moody: Moody) -> None:
    """READONLY replies: the worker waits, drops its connections, and goes on; one line says so."""
    near, worker = moody.client, moody.worker
    said = worker.log_text().count(AWAY)
    ids = moody.ask(150, prefix="ro")
    near.execute_command("REPLICAOF", "127.0.0.1", 1)
    wait_until(lambda: worker.log_text().count(AWAY) > said, timeout_s=15)
    near.execute_command("REPLICAOF", "NO", "ONE")
    all_answered_once(near, ids)
    assert worker.is_running
    assert worker.log_text().count(AWAY) <= said + 6


def test_a_demoted_server_is_left(valkey: Valkey, near: redis.Redis) -> None:
    """After READONLY, of a command or a script, the next command uses a new connection: the name is resolved again."""
    with connect(valkey.url, timeout_s=2) as client:
        first = client.client_id()
        near.execute_command("REPLICAOF", "127.0.0.1", 1)
        for write in (lambda: client.set("a", "b"), lambda: make_lease_queue(client, "w").claim(1)):
            before = client.client_id()
            with pytest.raises(redis.ReadOnlyError):
                write()
            assert client.client_id() != before
        near.execute_command("REPLICAOF", "NO", "ONE")
        assert client.set("a", "b")
        assert client.client_id() > first


def test_a_password_that_is_changed_and_changed_back(moody: Moody) -> None:
    """NOAUTH while it works: no reason to end or to spin, and told as what it is, with what to do."""
    near, worker = moody.client, moody.worker
    said = worker.log_text().count(REFUSED)
    near.config_set("requirepass", "secret")
    near.execute_command("AUTH", "secret")
    near.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    near.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: worker.log_text().count(REFUSED) > said, timeout_s=20)
    assert '"code": "redis_login"' in worker.log_text()
    before = int(near.info("stats")["total_connections_received"])
    near.blpop(["nothing"], timeout=3)
    tries = int(near.info("stats")["total_connections_received"]) - before
    assert tries < 100, "it tries without a pause"
    near.config_set("requirepass", "")
    ids = moody.ask(40, prefix="pw")
    all_answered_once(near, ids)
    assert worker.is_running


def test_a_clock_that_was_set_back_leaves_no_lease_without_end(redis_client: redis.Redis) -> None:
    """A lease that ends a day from now is cut to the longest that a client may ask for."""
    redis_client.lpush("shiwu.bulk", message("job"))
    [job] = make_lease_queue(redis_client, "dead").claim(1).jobs
    redis_client.zadd(LEASES, {"job": job.claimed_ms + 86_400_000})
    make_maintenance(redis_client).run_once()
    score = redis_client.zscore(LEASES, "job")
    assert score is not None
    assert 590_000 < score - job.claimed_ms < 610_000


def test_clock_jump_reruns_jobs_and_answers_once(redis_client: redis.Redis) -> None:
    """All leases expire immediately: another worker takes the job too, and the second answer is discarded."""
    redis_client.lpush("shiwu.bulk", message("job"))
    [first] = make_lease_queue(redis_client, "a").claim(1).jobs
    redis_client.zadd(LEASES, {"job": 1.0})
    assert make_maintenance(redis_client).run_once().reaped == 1
    [second] = make_lease_queue(redis_client, "b").claim(1).jobs
    assert make_answer_store(redis_client, "a").write([answer(first)]) == set()
    assert make_answer_store(redis_client, "b").write([answer(second)]) == {"job"}
    assert redis_client.xlen(RESULT_STREAM) == 1
