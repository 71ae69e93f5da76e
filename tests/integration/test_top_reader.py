"""What `shiwu top` reads from a real Valkey, what it costs there, and how it is printed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis
from click.testing import CliRunner, Result

from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.broker.queue_stats import QueueSnapshot, count_snapshot, kept_snapshot
from shiwu.broker.server_clock import server_time_ms
from shiwu.cli import main
from shiwu.contract import DEAD_ANSWERS, QUEUE_SNAPSHOT, WORKER_STATE, ErrorCode, Lane
from shiwu.top import reader as reader_module
from shiwu.top.look import Look
from shiwu.top.reader import LookReader
from tests.support import top_states
from tests.support.servers import Valkey

READS = {"time", "get", "mget", "xrevrange", "zrangebyscore", "zrevrange", "hmget"}
COUNTS = {"llen", "lindex", "hscan", "zcard", "hgetall"}


@pytest.fixture
def reader(redis_url: str, redis_client: redis.Redis) -> Iterator[LookReader]:
    """A reader of a server that was emptied."""
    with connect(redis_url, timeout_s=5) as client:
        yield LookReader(client)


def top(redis_url: str, *args: str) -> Result:
    """`shiwu top` with these arguments."""
    return CliRunner().invoke(main, ["--redis-url", redis_url, "top", *args])


def put_snapshot(client: redis.Redis, *, age_s: float, **changes: Any) -> None:
    """Leave a snapshot as a worker does, with these changes."""
    now_ms = server_time_ms(client)
    counted = count_snapshot(client, now_ms=now_ms - age_s * 1000)
    client.set(QUEUE_SNAPSHOT, msgspec.json.encode(msgspec.structs.replace(counted, **changes)))


def test_look_at_an_empty_server_has_no_figures(reader: LookReader) -> None:
    look = reader.read()
    assert [lane.waiting for lane in look.lanes] == [0, 0]
    assert (look.stages, look.workers, look.failures, look.backfills, look.images_per_s) == ((), (), (), (), 0.0)


def test_look_shows_every_part(reader: LookReader, redis_client: redis.Redis, redis_url: str) -> None:
    """Lanes, stages, workers of two versions, codes and a backfill."""
    top_states.fill(redis_client, redis_url)
    look = reader.read()
    assert {lane.lane: lane.waiting for lane in look.lanes} == {Lane.INTERACTIVE: 3, Lane.BULK: 40}
    assert all(lane.oldest_s is not None and 0 <= lane.oldest_s < 60 for lane in look.lanes)
    assert [(stage.stage, stage.share) for stage in look.stages if stage.share > 0.1] == [
        ("queue", 0.2),
        ("fetch", 0.2),
        ("encode", 0.5),
    ]
    assert (look.sample, look.answered, look.dead) == (60, 65, 5)
    assert [(worker.name, worker.state) for worker in look.workers] == [
        ("gpu-host-0", top_states.GPU_WORKER),
        ("gpu-host-1", None),
    ]
    assert [(failure.code, failure.count, failure.stage) for failure in look.failures] == [
        ("source_unavailable", 3, "fetch"),
        ("source_not_found", 2, "fetch"),
    ]
    [backfill] = look.backfills
    assert (backfill.name, backfill.phase, backfill.is_run, backfill.read, backfill.sent) == (
        *("night", "running", True),
        *(900, 800),
    )
    assert (backfill.answered, backfill.without_tags) == (700, 0)
    assert [letter.id for letter in reader.letters("source_not_found")] == ["gone1", "gone0"]


def test_snapshot_of_workers_is_used_while_it_is_new(reader: LookReader, redis_client: redis.Redis) -> None:
    """Then the queues are not counted here; a snapshot that is old, or of the future, is."""
    put_snapshot(redis_client, age_s=1.0, delayed=7)
    assert reader.read().delayed == 7
    redis_client.delete(QUEUE_SNAPSHOT)
    assert reader.read().delayed == 7, "it is a second old"
    for age_s in (16.0, -60.0):
        put_snapshot(redis_client, age_s=age_s, delayed=9)
        with connect("redis://{host}:{port}/{db}".format(**redis_client.get_connection_kwargs()), timeout_s=5) as other:
            assert LookReader(other).read().delayed == 0


def test_rates_come_from_two_snapshots(reader: LookReader, redis_client: redis.Redis) -> None:
    """50 answers in 5 s, of two lanes."""
    top_states.add_answers(redis_client, 20)
    put_snapshot(redis_client, age_s=6.0, answered=100)
    assert reader.read().answers_per_s is None
    top_states.add_answers(redis_client, 20, lane=Lane.INTERACTIVE, first=20)
    put_snapshot(redis_client, age_s=1.0, answered=150)
    look = reader.read()
    assert look.answers_per_s == pytest.approx(10.0, rel=0.1)
    assert [lane.out_per_s for lane in look.lanes] == pytest.approx([5.0, 5.0], rel=0.1)


def test_sample_is_that_of_the_newest_answers(
    reader: LookReader, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look reads pages until the sample is full; later ones read what is new, a page at most."""
    monkeypatch.setattr(reader_module, "SAMPLE_PAGE", 10)
    top_states.add_answers(redis_client, 230)
    assert reader.read().sample == 200
    assert {answer.id for answer in reader._answers} == {f"a{number}" for number in range(30, 230)}
    top_states.add_answers(redis_client, 15, first=230)
    reader.read()
    assert [answer.id for answer in reader._answers][-10:] == [f"a{number}" for number in range(235, 245)]
    reader.read()
    assert [answer.id for answer in reader._answers][-1] == "a244"


def test_letters_are_read_once_and_forgotten_when_gone(
    reader: LookReader, redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the newest ones are counted."""
    monkeypatch.setattr(reader_module, "MAX_LETTERS", 3)
    top_states.add_dead(redis_client, "x", 4, code=ErrorCode.SOURCE_NOT_FOUND)
    look = reader.read()
    assert (look.dead, look.dead_read, [failure.count for failure in look.failures]) == (4, 3, [3])
    redis_client.delete(DEAD_ANSWERS)
    reader.list_soon()
    assert reader.read().dead_read == 3, "known letters are not read again"
    with Client(redis_url) as client:
        client.drop(["x3", "x2", "x1", "x0"])
    assert reader.read().dead_read == 3, "the list is ten seconds old at most"
    reader.list_soon()
    assert (reader.read().failures, reader.letters("source_not_found")) == ((), [])


def test_values_of_other_programs_do_not_stop_it(reader: LookReader, redis_client: redis.Redis) -> None:
    """Of a worker, an answer, a dead letter and a backfill."""
    top_states.add_worker(redis_client, "w", None)
    redis_client.set(f"{WORKER_STATE}w", "\xff{")
    redis_client.xadd("shiwu:results", {"x": "y"})
    redis_client.zadd("shiwu:dead", {b"\xff": 1.0, "lost": 2.0})
    top_states.add_backfill(redis_client, "odd", phase="x", sent="many", heartbeat_ms="soon")
    look = reader.read()
    assert look.workers[0].state is None
    assert (look.sample, look.failures) == (0, ())
    assert (look.backfills[0].sent, look.backfills[0].is_run) == (0, False)


@pytest.mark.parametrize("has_snapshot", [True, False], ids=["workers-count", "top-counts"])
def test_a_view_sends_less_than_five_commands_a_second(
    redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, has_snapshot: bool
) -> None:
    """In two minutes of a busy service, by clocks that the test moves; none of them writes."""
    top_states.fill(redis_client, redis_url)
    put_snapshot(redis_client, age_s=1.0)
    passed_s = [0.0]

    def now_ms(client: redis.Redis) -> float:
        return server_time_ms(client) + passed_s[0] * 1000

    def kept(client: redis.Redis) -> QueueSnapshot | None:
        found = kept_snapshot(client)
        return (
            msgspec.structs.replace(found, at_ms=found.at_ms + passed_s[0] * 1000) if found and has_snapshot else None
        )

    monkeypatch.setattr(reader_module, "server_time_ms", now_ms)
    monkeypatch.setattr(reader_module, "kept_snapshot", kept)
    with connect(redis_url, timeout_s=5) as client:
        reader = LookReader(client, clock=lambda: passed_s[0])
        redis_client.config_resetstat()
        for _ in range(60):
            reader.read()
            passed_s[0] += 2.0
        calls: Any = redis_client.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): figures["calls"] for name, figures in calls.items()}
    ours = {name: count for name, count in counts.items() if name not in {"config|resetstat", "info", "ping"}}
    ours = {name: count for name, count in ours.items() if not name.startswith(("client", "hello", "select"))}
    assert set(ours) <= (READS if has_snapshot else READS | COUNTS)
    assert sum(ours.values()) / 120 < (3.1 if has_snapshot else 5.0), ours


def test_outage_is_told_beside_the_last_figures(valkey: Valkey) -> None:
    """And ends when the server is there again."""
    with connect(valkey.url, timeout_s=1) as client:
        top_states.add_dead(valkey.client(), "x", 1, code=ErrorCode.SOURCE_NOT_FOUND)
        now_s = [100.0]
        reader = LookReader(client, clock=lambda: now_s[0])
        assert (reader.look().problem, reader.look().dead) == (None, 1)
        valkey.kill()
        now_s[0] += 3.0
        look = reader.look()
        assert look.problem is not None
        assert (look.dead, look.away_s) == (1, 3.0)
        valkey.start()
        assert reader.look().problem is None


def test_once_prints_tables(redis_client: redis.Redis, redis_url: str) -> None:
    top_states.fill(redis_client, redis_url)
    done = top(redis_url, "--once")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["bulk", "40", "0", "–", "–"] in [row[:5] for row in rows]
    assert ["encode", "50", "ms", "50", "ms", "50%"] in [row[:6] for row in rows]
    assert "2 workers, 812 images/s" in done.output
    assert "OFA-Sys/chinese-clip-vit-base-patch16@36e679e65c2a" in done.output
    assert ["source_unavailable", "3"] in [row[:2] for row in rows]
    assert ["night", "running", "700/800", "0"] in rows


def test_once_as_json_is_one_object(redis_client: redis.Redis, redis_url: str) -> None:
    top_states.fill(redis_client, redis_url)
    done = top(redis_url, "--once", "--json")
    look = json.loads(done.output)
    assert list(look) == list(Look.__struct_fields__)
    assert look["lanes"][1] == look["lanes"][1] | {"lane": "bulk", "waiting": 40, "out_per_s": None}
    assert look["workers"][0]["state"]["images_per_s"] == 812.4
    assert look["problem"] is None


def test_json_is_a_line_for_each_look_until_ctrl_c(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is a line too, with its reason."""
    pauses = []

    def wait(_: threading.Event, timeout: float) -> None:
        pauses.append(timeout)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        valkey.kill()

    monkeypatch.setattr(threading.Event, "wait", wait)
    done = top(valkey.url, "--json", "--every", "3")
    first, second = map(json.loads, done.output.splitlines())
    assert (done.exit_code, pauses) == (0, [3.0, 3.0])
    assert first["problem"] is None
    assert "refused" in second["problem"]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--once"], 4, "refused"),
        ([], 2, "expected a terminal"),
        (["--once", "--every", "0.5"], 2, "from 2 on"),
    ],
    ids=["away", "no-terminal", "too-often"],
)
def test_command_says_why_it_cannot_look(args: list[str], code: int, text: str) -> None:
    done = top("redis://127.0.0.1:1/0", *args)
    assert (done.exit_code, text in done.output) == (code, True), done.output


def test_without_textual_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shiwu.top.command.find_spec", lambda _: None)
    done = top("redis://127.0.0.1:1/0")
    assert (done.exit_code, "pip install '.[top]'" in done.output) == (2, True)
