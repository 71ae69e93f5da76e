"""The client and the command `shiwu` with a real Redis and a real worker."""

from __future__ import annotations

import json

import pytest
import redis
from click.testing import CliRunner

from shiwu import Client, JobFailed, QueueFull, RequestError, WaitTimeout
from shiwu.cli import main
from shiwu.contract import Lane
from tests.support import pictures
from tests.support.both_clients import OpenClient
from tests.support.redis_parts import answer, make_answer_store, make_lease_queue
from tests.support.servers import S3Server, WorkerProcess


def finish(client: redis.Redis, *, count: int = 1000, worker: str = "w") -> None:
    """Answer waiting jobs, as a worker does."""
    while jobs := make_lease_queue(client, worker).claim(count).jobs:
        make_answer_store(client, worker).write([answer(job) for job in jobs])


def test_client_same_id_is_answered_once(open_client: OpenClient, redis_url: str, redis_client: redis.Redis) -> None:
    """An id may be sent twice and is answered once; an answer that exists is returned without waiting."""
    with open_client(redis_url) as client:
        assert client.enqueue("s3://b/k", id="mine") == "mine"
        assert client.answer("mine") is None
        with pytest.raises(WaitTimeout):
            client.wait("mine", timeout_s=0.2)
        client.enqueue("s3://b/k", id="mine", lane="bulk", priority=5)
        finish(redis_client)
        assert client.wait("mine", timeout_s=5).ok
        assert redis_client.xlen("shiwu:results") == 1


def test_priority_chooses_the_list_of_its_step(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """As kombu divides priorities: 0 to 2, 3 to 5, 6 to 8 and 9."""
    with open_client(redis_url) as client:
        for priority in range(10):
            client.enqueue("s3://b/k", lane="bulk", priority=priority)
    [most_urgent, *others] = Lane.BULK.keys
    assert redis_client.llen(most_urgent) == 3
    assert {key[-1]: redis_client.llen(key) for key in others} == {"3": 3, "6": 3, "9": 1}


def test_enqueue_many_full_lane_raises_queue_full(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """Portions are sent as they are read; a full lane takes nothing of the portion, and the error has the numbers."""
    with open_client(redis_url, max_waiting=1000) as client:
        ids = list(client.enqueue_many((f"s3://b/{n}" for n in range(1000)), batch_size=300))
        assert len(set(ids)) == 1000
        assert client.queue_state().waiting == {Lane.INTERACTIVE: 0, Lane.BULK: 1000}
        with pytest.raises(QueueFull, match="holds 1000 of 1000"):
            client.enqueue("s3://b/k", lane="bulk")
        client.enqueue("s3://b/k", lane="interactive")
        make_lease_queue(redis_client, "w").claim(10)
        state = client.queue_state()
        assert sum(state.claimed.values()) == 10
        finish(redis_client, worker="v")
        assert len(list(client.as_answered(ids, timeout_s=0.3))) >= 900


def test_enqueue_many_invalid_item_sends_no_portion(open_client: OpenClient, redis_url: str) -> None:
    """The whole portion is checked first."""
    with open_client(redis_url) as client:
        with pytest.raises(RequestError):
            list(client.enqueue_many(["s3://b/k", "no scheme"]))
        with pytest.raises(RequestError):
            client.enqueue("s3://b/k", id="x" * 256)
        assert sum(client.queue_state().waiting.values()) == 0


def test_results_of_a_crashed_consumer_are_delivered_again(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """Every group gets all answers; unacknowledged ones return to their consumer, or later go to another."""
    with open_client(redis_url) as client:
        ids = set(client.enqueue_many([f"s3://b/{n}" for n in range(50)]))
        finish(redis_client)

        def read(group: str, consumer: str, *, ack: bool, reclaim_idle_s: float = 60.0) -> list[str]:
            ids_read = []
            for item in client.results(
                group=group,
                consumer=consumer,
                block_s=0.05,
                reclaim_idle_s=reclaim_idle_s,
                stop_when_idle=True,
                batch=20,
            ):
                ids_read.append(item.result.id)
                if ack:
                    item.ack()
            return ids_read

        assert sorted(read("a", "one", ack=False)) == sorted(ids)
        assert sorted(read("b", "one", ack=True)) == sorted(ids)
        assert read("b", "one", ack=True) == []
        assert set(read("a", "two", ack=True, reclaim_idle_s=0.0)) == ids
        assert read("a", "one", ack=True) == []


def test_cli_tag_shows_tags_and_errors(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """`shiwu tag` with an image and a missing one: a table, JSON lines, and exit code 1."""
    good = s3.put("cli/a.jpg", pictures.jpeg(pictures.picture("熊猫")))
    runner = CliRunner()
    base = ["--redis-url", shared_worker.redis_url]
    shown = runner.invoke(main, [*base, "tag", good, good, "--labels", "熊猫,汽车,zzz"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("熊猫") == 2
    warnings = shown.output.count("warning: the model cannot read 1 of 3 labels")
    assert warnings == 1, "one line for a warning that both answers have"
    none = runner.invoke(main, [*base, "tag", good, "--labels", "熊猫,汽车", "--min-cosine", "0.99"])
    assert "no tag reached" in none.output
    lines = runner.invoke(main, [*base, "tag", good, "s3://pictures/cli/none", "--json"])
    assert lines.exit_code == 1
    # click 8.1 shows standard error in the same text.
    printed = [line for line in lines.stdout.splitlines() if line.startswith("{")]
    assert {json.loads(line)["status"] for line in printed} == {"tagged", "rejected"}
    asked = runner.invoke(main, [*base, "enqueue", "-"], input=f"# mine\n{good}\n\n")
    assert len(asked.output.split()) == 1
    status = runner.invoke(main, [*base, "status", "--json"])
    assert json.loads(status.output)["workers"] == ["shared"]
    with Client(shared_worker.redis_url) as client, pytest.raises(JobFailed, match="source_not_found"):
        client.tag("s3://pictures/cli/none", timeout_s=20)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["tag", "no-scheme"], 2, "invalid_reference"),
        (["tag"], 2, "Missing argument"),
        (["tag", "s3://b/k", "--timeout", "0.2"], 3, "wait_timeout"),
        (["--redis-url", "redis://127.0.0.1:1", "status"], 4, "redis"),
    ],
)
def test_cli_errors_have_exit_codes(redis_url: str, arguments: list[str], code: int, text: str) -> None:
    """One line names the remedy, and the exit code is the one that --help lists."""
    first = [] if "--redis-url" in arguments else ["--redis-url", redis_url]
    result = CliRunner().invoke(main, [*first, *arguments])
    assert result.exit_code == code
    assert text in result.output
    assert "Traceback" not in result.output


def test_enqueue_of_a_too_large_message_sends_nothing(
    open_client: OpenClient, redis_url: str, redis_client: redis.Redis
) -> None:
    """Every worker would refuse it, after Redis had held it several times."""
    labels = [f"{n}" + "猫" * 95 for n in range(1000)]
    with open_client(redis_url) as client, pytest.raises(RequestError, match="at most 262144 bytes") as caught:
        list(client.enqueue_many(["s3://b/small", {"image": "s3://b/large", "labels": labels}]))
    assert caught.value.code == "message_too_large"
    assert redis_client.llen(Lane.BULK.queue) == 0
