"""`shiwu enqueue -` and `Client.enqueue_many`: long lists, a lane with a limit, and a second run."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from click.testing import CliRunner, Result

from shiwu import Client, QueueFull
from shiwu.cli import main
from shiwu.contract import RESULT_STREAM, Lane
from shiwu_worker.jobs.job import open_job
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import clean_environment
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue
from tests.support.waiting import wait_until

REFERENCES = "".join(f"s3://b/{number}\n" for number in range(25))


def run(url: str, *options: str, text: str = REFERENCES) -> Result:
    """`shiwu enqueue -` in this process."""
    return CliRunner().invoke(main, ["--redis-url", url, "enqueue", "-", *options], input=text)


def take(client: redis.Redis) -> int:
    """Answer what waits; how many there were."""
    jobs = make_lease_queue(client, "w").claim(1000).jobs
    make_answer_store(client, "w").write([answer(job) for job in jobs])
    return len(jobs)


def waiting(client: redis.Redis) -> int:
    """How many messages wait in the bulk lane."""
    return sum(int(client.llen(key)) for key in Lane.BULK.keys)


def test_cli_enqueue_without_wait_ends_at_the_limit(redis_url: str, redis_client: redis.Redis) -> None:
    """Ids that were enqueued are printed; then it ends with exit code 4."""
    result = run(redis_url, "--limit", "10", "--no-wait")
    assert result.exit_code == 4
    assert len(result.stdout.split()) == waiting(redis_client) == 10
    assert "10 ids were printed" in result.stderr
    assert "queue_full" in result.stderr


def test_cli_enqueue_waits_for_space_in_the_lane(redis_url: str, redis_client: redis.Redis) -> None:
    """By default; standard error reports the wait, and the lane never holds more than its limit."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, redis_url, "--limit", "10")
        answered = 0
        while answered < 25:
            wait_until(lambda: waiting(redis_client), timeout_s=20)
            assert waiting(redis_client) <= 10
            answered += take(redis_client)
        result = running.result(timeout=20)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) == 25
    assert "lane bulk, which holds" in result.stderr


def test_cli_enqueue_with_id_from_runs_twice(redis_url: str, redis_client: redis.Redis) -> None:
    """The second run prints the same ids and adds no jobs; other labels give other ids."""
    first = run(redis_url, "--id-from", "reference").stdout
    second = run(redis_url, "--id-from", "reference").stdout
    assert first == second
    assert len(set(first.split())) == 25
    while take(redis_client):
        pass
    assert redis_client.xlen(RESULT_STREAM) == 25
    third = run(redis_url, "--id-from", "reference", "--labels", "猫,狗").stdout
    assert not set(first.split()) & set(third.split())


def test_cli_enqueue_reads_ids_from_lines(redis_url: str) -> None:
    """An id and a tab before the reference; other lines get a new id."""
    text = "# mine\norder 1\ts3://b/1\n\ns3://b/2\norder 3\t s3://b/3 \n"
    ids = run(redis_url, text=text).stdout.splitlines()
    assert (ids[0], ids[2], len(ids)) == ("order 1", "order 3", 3)
    refused = run(redis_url, text="\ts3://b/1\nx\t\n")
    assert refused.exit_code == 2
    assert "invalid_reference" in refused.stderr


def test_cli_enqueue_without_redis_fails_immediately() -> None:
    """It waits for a Redis that becomes unavailable, not for one that never answered."""
    assert run("redis://127.0.0.1:1").exit_code == 4


def test_cli_enqueue_interrupted_reports_the_count(redis_url: str, redis_client: redis.Redis) -> None:
    """Ctrl-C in a real process that waits for space."""
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", redis_url, "enqueue", "-", "--limit", "10"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=clean_environment({}), text=True, **pipes) as process:  # type: ignore[call-overload]  # pipes by name
        process.stdin.write(REFERENCES)
        process.stdin.close()
        wait_until(lambda: waiting(redis_client) == 10, timeout_s=30)
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        ids, rest = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=20) == 130
    assert len(ids.split()) == 10
    assert "waiting" in first
    assert "10 ids were printed" in rest
    assert "Traceback" not in rest


def test_enqueue_many_waits_for_space_and_for_redis(
    redis_url: str, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """For up to `wait_s`; a portion that is sent again keeps its ids."""
    with FaultProxy(redis_url) as proxy, Client(proxy.url, max_waiting=10, timeout_s=1) as client:
        assert len(list(client.enqueue_many([f"s3://b/{n}" for n in range(10)]))) == 10
        with pytest.raises(QueueFull):
            list(client.enqueue_many(["s3://b/k"], wait_s=0.3))
        list(client.enqueue_many(["s3://b/k"], max_waiting=11))
        take(redis_client)
        proxy.refuse()
        with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING, logger="shiwu"):
            running = pool.submit(lambda: list(client.enqueue_many(["s3://b/a", "s3://b/b"], wait_s=60)))
            wait_until(lambda: "redis_away" in caplog.text, timeout_s=20)
            proxy.heal()
            assert len(running.result(timeout=20)) == 2
    assert waiting(redis_client) == 2


def test_cli_enqueue_names_a_webhook(redis_url: str, redis_client: redis.Redis) -> None:
    """In every request; a text that is neither a name nor an https URL is refused."""
    assert run(redis_url, "--callback", "orders", text="s3://b/1\ns3://b/2\n").exit_code == 0
    jobs = [open_job(claimed) for claimed in make_lease_queue(redis_client, "w").claim(10).jobs]
    assert [job.request.callback for job in jobs if job.request] == ["orders"] * 2
    refused = run(redis_url, "--callback", "http://h/", text="s3://b/1\n")
    assert (refused.exit_code, "callback: expected the name" in refused.stderr) == (2, True)
