"""A backfill on a real server: back-pressure, wishes of the operator, another pass, and answers that were lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from shiwu.backfill import collector, feeder, runner
from shiwu.backfill.errors import TakenOver
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase
from shiwu.client.sole_consumer import SoleConsumer
from shiwu.client.stream_items import Entry
from shiwu.contract import BACKFILL_OPEN, RESULT_STREAM, Lane, done_key, result_key
from shiwu.parts.errors import TargetError
from tests.support.answering import AnsweringThread
from tests.support.backfills import LocalBackfill, reference_of, references_of, rows_of, summary_of, write_list
from tests.support.waiting import wait_until

LANE = Lane.BULK.keys[0]


@pytest.fixture(autouse=True)
def _quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BLOCK_S", 0.01)
    monkeypatch.setattr(runner, "CONTROL_EVERY_S", 0.05)
    monkeypatch.setattr(collector, "LOOK_UP_IDLE_S", 0.1)


@pytest.fixture
def backfill(redis_url: str) -> Iterator[LocalBackfill]:
    """Backfills on an empty server."""
    with LocalBackfill(redis_url) as made:
        yield made


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """100 images, and a folder for the results."""
    return Plan(str(write_list(tmp_path / "list.jsonl", 100)), out=str(tmp_path / "out"))


@contextmanager
def running(run: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run in a thread for the block; the list gets what it returned or raised, at the latest at the end."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run())
        except Exception as error:  # noqa: BLE001 border: the test looks at it
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield found
    finally:
        thread.join(timeout=60)
        assert not thread.is_alive()


def waiting(client: redis.Redis) -> int:
    """Messages in the bulk lane."""
    return int(client.llen(LANE))  # type: ignore[arg-type]  # redis-py's types include awaitables


def test_own_unanswered_jobs_are_limited(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """Messages of others in the lane do not count."""
    redis_client.lpush(LANE, *["x"] * 50)
    with running(lambda: backfill.run("night", plan, Pace(max_waiting=30))) as found:
        wait_until(lambda: waiting(redis_client) == 80, timeout_s=10)
        wait_until(lambda: len(backfill.shown) > 10, timeout_s=10)
        assert waiting(redis_client) == 80
        assert {shown.unanswered for shown in backfill.shown[5:]} == {30}
        redis_client.lrem(LANE, 0, "x")
        with AnsweringThread(redis_url):
            wait_until(lambda: found, timeout_s=20)
    assert found == [Phase.FINISHED]
    assert len(references_of(tmp_path / "out")) == 100
    assert max(shown.unanswered for shown in backfill.shown) == 30


def test_full_lane_is_waited_for(
    backfill: LocalBackfill,
    plan: Plan,
    redis_client: redis.Redis,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The display says why nothing is sent."""
    monkeypatch.setattr(runner, "LANE_LIMIT", 120)
    redis_client.lpush(LANE, *["x"] * 120)
    with running(lambda: backfill.run("night", plan, Pace(max_waiting=20))) as found:
        wait_until(lambda: backfill.shown and "holds 120 of 120" in backfill.shown[-1].reason, timeout_s=10)
        redis_client.delete(LANE)
        with AnsweringThread(redis_url):
            wait_until(lambda: found, timeout_s=20)
    assert found == [Phase.FINISHED]
    assert backfill.shown[-1].reason == ""


def test_window_lets_nothing_through_outside(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str
) -> None:
    """What was sent before is collected meanwhile."""
    clock = [datetime(2026, 11, 30, 13, 59, tzinfo=UTC)]
    pace = Pace(window="22:00-06:00@Asia/Shanghai")
    with running(lambda: backfill.run("night", plan, pace, clock=lambda: clock[0])) as found:
        wait_until(lambda: len(backfill.shown) > 3, timeout_s=10)
        assert backfill.shown[-1].reason == "waiting for 22:00 Asia/Shanghai"
        assert waiting(redis_client) == 0
        clock[0] = datetime(2026, 11, 30, 14, 0, tzinfo=UTC)
        with AnsweringThread(redis_url):
            wait_until(lambda: found, timeout_s=20)
    assert found == [Phase.FINISHED]


def test_pause_holds_until_resume(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str
) -> None:
    """A paused backfill answers what it has sent, and stays paused over a restart."""
    with running(lambda: backfill.run("night", plan, Pace(max_waiting=10))) as found:
        wait_until(lambda: waiting(redis_client) == 10, timeout_s=10)
        backfill.state("night").want("pause")
        wait_until(lambda: backfill.shown[-1].reason == "paused", timeout_s=10)
        with AnsweringThread(redis_url):
            wait_until(lambda: backfill.shown[-1].answered == 10, timeout_s=10)
            backfill.is_stopping = True
            wait_until(lambda: found, timeout_s=10)
    assert found == [Phase.RUNNING]
    backfill.is_stopping = False
    with AnsweringThread(redis_url), running(lambda: backfill.run("night", plan)) as found:
        wait_until(lambda: backfill.shown[-1].reason == "paused", timeout_s=10)
        assert backfill.shown[-1].answered == 10
        backfill.state("night").want("")
        wait_until(lambda: found, timeout_s=20)
    assert found == [Phase.FINISHED]


def test_cancel_answers_what_waits(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Each job that was sent has a row; the rest of the source has none."""
    with running(lambda: backfill.run("night", plan, Pace(max_waiting=10))) as found:
        wait_until(lambda: waiting(redis_client) == 10, timeout_s=10)
        backfill.state("night").want("cancel")
        wait_until(lambda: found, timeout_s=10)
    assert found == [Phase.CANCELLED]
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["cancelled"] * 10
    assert {reference_of(row) for row in rows} == {f"s3://b/{number:05}.jpg" for number in range(10)}
    assert summary_of(tmp_path / "out")["phase"] == "cancelled"


def test_too_many_failures_stop_until_the_next_start(
    backfill: LocalBackfill, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the first 60 are broken, and few of the rest."""
    monkeypatch.setattr(runner, "FAILURES_AFTER", 20)
    monkeypatch.setattr(runner, "CONTROL_EVERY_S", 0.0)  # looks at the failures after each portion
    images = write_list(tmp_path / "list.jsonl", 60, broken_every=2)
    with images.open("a") as file:
        file.writelines(json.dumps({"image": f"s3://b/good-{number}.jpg"}) + "\n" for number in range(200))
    plan = Plan(str(images), out=str(tmp_path / "out"))
    pace = Pace(max_waiting=10, stop_at_failures=0.4)
    with AnsweringThread(redis_url):
        assert backfill.run("night", plan, pace) is Phase.STOPPED
        stopped = summary_of(tmp_path / "out")
        assert 20 <= stopped["answered"] == stopped["sent"] < 200
        phases = [backfill.run("night", plan, pace) for _ in range(3)]
    assert Phase.FINISHED in phases
    assert len(references_of(tmp_path / "out")) == 260


def test_stop_sends_what_is_registered(
    backfill: LocalBackfill, redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portion that waits for space in the lane while failures end the rest."""
    monkeypatch.setattr(runner, "FAILURES_AFTER", 10)
    monkeypatch.setattr(runner, "CONTROL_EVERY_S", 0.0)
    monkeypatch.setattr(runner, "LANE_LIMIT", 20)
    plan = Plan(str(write_list(tmp_path / "list.jsonl", 60, broken_every=1)), out=str(tmp_path / "out"))
    pace = Pace(max_waiting=20, stop_at_failures=0.5)
    with running(lambda: backfill.run("night", plan, pace)) as found:
        wait_until(lambda: waiting(redis_client) == 20, timeout_s=10)
        redis_client.lpush(LANE, *["x"] * 40)
        with AnsweringThread(backfill.url, batch=5):
            wait_until(lambda: found, timeout_s=20)
    assert found == [Phase.STOPPED]
    summary = summary_of(tmp_path / "out")
    assert summary["answered"] == summary["sent"] == summary["rows"]


def test_another_pass_sends_only_what_is_missing(backfill: LocalBackfill, redis_url: str, tmp_path: Path) -> None:
    images = write_list(tmp_path / "list.jsonl", 30)
    plan = Plan(str(images), out=str(tmp_path / "out"))
    with AnsweringThread(redis_url):
        assert backfill.run("night", plan) is Phase.FINISHED
        with images.open("a") as file:
            file.write('{"image": "s3://b/new.jpg"}\n')
        assert backfill.run("night", plan, Pace(is_missing_only=True)) is Phase.FINISHED
    found = references_of(tmp_path / "out")
    assert found == dict.fromkeys([*(f"s3://b/{number:05}.jpg" for number in range(30)), "s3://b/new.jpg"], 1)
    assert [row["name"] for row in json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]] == [
        "part-00001.jsonl",
        "part-00002.jsonl",
    ]


# ------------------------------------------------------------------------------------ lost answers
def send_and_stop(backfill: LocalBackfill, plan: Plan, client: redis.Redis) -> None:
    """Send everything, and end before an answer."""
    with running(lambda: backfill.run("night", plan)) as found:
        wait_until(lambda: waiting(client) == 100, timeout_s=10)
        backfill.is_stopping = True
    assert found == [Phase.RUNNING]
    backfill.is_stopping = False


def answer_all(client: redis.Redis, url: str) -> None:
    """Let all messages in the lane be answered."""
    with AnsweringThread(url):
        wait_until(lambda: int(client.hget("shiwu:counters", "answered") or 0) == 100, timeout_s=10)


def test_trimmed_stream_is_made_up_for_by_keys(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """All entries of the stream are gone when the process comes back."""
    send_and_stop(backfill, plan, redis_client)
    answer_all(redis_client, redis_url)
    redis_client.xtrim(RESULT_STREAM, maxlen=0)
    assert backfill.run("night", plan) is Phase.FINISHED
    assert set(references_of(tmp_path / "out").values()) == {1}
    assert summary_of(tmp_path / "out")["by_status"] == {"tagged": 100}


def test_entries_trimmed_while_unwritten_come_by_key(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """They were delivered to a process that was killed, and are gone when its successor asks for them."""
    send_and_stop(backfill, plan, redis_client)
    answer_all(redis_client, redis_url)
    redis_client.xreadgroup("backfill.night", "backfill", {RESULT_STREAM: ">"}, count=60)
    redis_client.xtrim(RESULT_STREAM, maxlen=0)
    assert backfill.run("night", plan) is Phase.FINISHED
    assert len(references_of(tmp_path / "out")) == 100


def test_unreadable_entry_is_looked_up(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """Answers of a newer version cannot be read from the stream, nor under their keys: their rows say so."""
    send_and_stop(backfill, plan, redis_client)
    answer_all(redis_client, redis_url)
    entries: Any = redis_client.xrange(RESULT_STREAM)
    job_id = entries[0][1][b"id"].decode()
    redis_client.xtrim(RESULT_STREAM, maxlen=0)
    redis_client.xadd(RESULT_STREAM, {"id": job_id, "answer": '{"id": 3}'})
    meta = {"status": "SUCCESS", "task_id": job_id, "result": {"id": job_id, "status": 3, "version": 9}}
    redis_client.set(result_key(job_id), json.dumps(meta))
    assert backfill.run("night", plan) is Phase.FINISHED
    assert summary_of(tmp_path / "out")["by_code"] == {"answer_unreadable": 1}
    assert len(references_of(tmp_path / "out")) == 100


def test_lost_messages_are_sent_again(
    backfill: LocalBackfill,
    plan: Plan,
    redis_client: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server lost its lane; and of one job the answer, but not its mark."""
    monkeypatch.setattr(runner, "LOST_AFTER_S", 0.3)
    send_and_stop(backfill, plan, redis_client)
    redis_client.delete(LANE)
    job_id = next(job_id for job_id, _ in backfill.state("night").open_jobs())
    redis_client.set(done_key(job_id), "worker:1")
    with AnsweringThread(backfill.url):
        assert backfill.run("night", plan) is Phase.FINISHED
    summary = summary_of(tmp_path / "out")
    assert (summary["resent"], summary["sent"]) == (99, 100)
    assert summary["by_code"] == {"already_answered": 1}
    assert len(references_of(tmp_path / "out")) == 100


# ------------------------------------------------------------------------------------ owners and outputs
def test_successor_ends_its_predecessor(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    with running(lambda: backfill.run("night", plan, Pace(max_waiting=10))) as first:
        wait_until(lambda: waiting(redis_client) == 10, timeout_s=10)
        with AnsweringThread(redis_url), LocalBackfill(redis_url) as other:
            assert other.run("night", plan) is Phase.FINISHED
        wait_until(lambda: first, timeout_s=10)
    assert isinstance(first[0], TakenOver)
    assert set(references_of(tmp_path / "out").values()) == {1}


def test_process_that_lost_its_backfill_makes_no_group(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs before its first read, while its successor ends and deletes the group."""
    send = feeder.Feeder.step

    def send_and_hang(self: feeder.Feeder, *, is_reading: bool) -> bool:
        monkeypatch.undo()
        has_sent = send(self, is_reading=is_reading)
        backfill.state("night").take("successor", now_ms=0.0)
        redis_client.xgroup_destroy(RESULT_STREAM, "backfill.night")
        return has_sent

    monkeypatch.setattr(feeder.Feeder, "step", send_and_hang)
    with pytest.raises(TakenOver):
        backfill.run("night", plan)
    assert redis_client.xinfo_groups(RESULT_STREAM) == []


def test_process_that_hung_at_its_first_read_makes_no_group(
    backfill: LocalBackfill, plan: Plan, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even between the check that it still owns the backfill and the read."""
    read = SoleConsumer.read

    def hang_and_read(self: SoleConsumer, *, block_s: float) -> list[Entry]:
        monkeypatch.undo()
        backfill.state("night").take("successor", now_ms=0.0)
        redis_client.xgroup_destroy(RESULT_STREAM, "backfill.night")
        return read(self, block_s=block_s)

    monkeypatch.setattr(SoleConsumer, "read", hang_and_read)
    with pytest.raises(TakenOver):
        backfill.run("night", plan)
    assert redis_client.xinfo_groups(RESULT_STREAM) == []


def test_missing_part_is_told(backfill: LocalBackfill, plan: Plan, redis_url: str, tmp_path: Path) -> None:
    """As when a start follows on another machine."""
    with AnsweringThread(redis_url), running(lambda: backfill.run("night", plan, Pace(rate=50, part_rows=5))) as found:
        wait_until(lambda: list((tmp_path / "out").glob("part-*")), timeout_s=10)
        backfill.is_stopping = True
        wait_until(lambda: found, timeout_s=10)
    backfill.is_stopping = False
    (tmp_path / "out" / "part-00001.jsonl").unlink()
    with pytest.raises(TargetError, match=r"expected the part part-00001.jsonl"):
        backfill.run("night", plan)


def test_counts_without_results(backfill: LocalBackfill, redis_url: str, tmp_path: Path) -> None:
    plan = Plan(str(write_list(tmp_path / "list.jsonl", 50, broken_every=10)))
    with AnsweringThread(redis_url):
        assert backfill.run("night", plan) is Phase.FINISHED
    saved = backfill.state("night").read()
    assert saved is not None
    assert saved.totals.by("code") == {"source_not_found": 5}
    assert (saved.totals.answered, saved.totals.failed, saved.parts) == (50, 5, {})
    assert not backfill.redis.exists(f"{BACKFILL_OPEN}night")
    assert 0 < int(backfill.redis.ttl("shiwu:backfill:night")) <= 30 * 86_400  # type: ignore[arg-type]  # redis' own


def test_parquet_parts_have_columns(backfill: LocalBackfill, redis_url: str, tmp_path: Path) -> None:
    images = write_list(tmp_path / "list.jsonl", 20, broken_every=10)
    with images.open("a") as file:
        file.write('{"image": "s3://b/with.jpg", "team": "猫"}\n{"image": 3}\n')
    plan = Plan(str(images), out=str(tmp_path / "out"), format="parquet")
    with AnsweringThread(redis_url):
        assert backfill.run("night", plan, Pace(part_rows=10)) is Phase.FINISHED
    rows = {row["reference"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == 22
    row = rows["s3://b/with.jpg"]
    assert row["tags"] == [{"label": "猫", "score": pytest.approx(0.9), "cosine": pytest.approx(0.2)}]
    assert (row["metadata"], row["status"], row["width"]) == ('{"team":"猫"}', "tagged", 1)
    assert row["answered_at"].tzinfo is not None
    assert rows["s3://b/00000-broken.jpg"]["error_code"] == "source_not_found"
    assert rows[None]["status"] == "rejected"
