"""What a consumer asks of the stream, and what it makes of the replies, without a server."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError

from shiwu import RequestError
from shiwu.broker import steps
from shiwu.broker.steps import run
from shiwu.client import stream as module
from shiwu.client.shard_stream import follow
from shiwu.client.stream import (
    CLEANUP_EVERY_S,
    CONSUMER_TTL_S,
    MIN_WAIT_S,
    StreamOptions,
    StreamReader,
    read_options,
)
from shiwu.client.stream_items import GIVEN_UP_MS, Entry
from shiwu.contract import RESULT_STREAM, Answer, Status
from tests.support.clock import Clock

ARGUMENTS: dict[str, Any] = {
    "group": "g",
    "consumer": "me",
    "batch": 3,
    "block_s": 0.5,
    "max_block_s": 2.5,
    "reclaim_idle_s": 10.0,
    "stop_when_idle": False,
    "away_s": None,
    "on_unreadable": pytest.fail,
}


def entry(number: int) -> tuple[bytes, dict[bytes, bytes]]:
    """An answer in the stream."""
    return f"{number}-0".encode(), {b"answer": Answer(id=f"j{number}", status=Status.TAGGED).to_json()}


class Parts:
    """A reader over commands that give what the test says, and keep what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        self.options: StreamOptions = read_options(**(ARGUMENTS | arguments))
        self.calls: list[tuple[str, Any]] = []
        self.reads: list[Any] = []
        self.claims: list[Any] = []
        self.pending: Any = {"pending": 0, "max": None, "consumers": []}
        self.held_by: dict[str, list[Any]] = {}
        self.held: Any = []
        self.client: Any = SimpleNamespace(
            register_script=self._script,
            xgroup_create=lambda *_, **options: self._call("create", options),
            xreadgroup=self._read,
            xautoclaim=self._claim,
            xpending=lambda *_: self._call("pending", self.pending),
            pipeline=self._pipeline,
            xack=lambda *args: self._call("ack", args),
        )
        self.reader = StreamReader(self.options)

    def _script(self, source: str) -> Any:
        name, reply = ("hold", self.held) if "JUSTID" in source else ("drop", 0)
        return lambda *, keys, args: self._call(name, args, reply)

    def _call(self, name: str, asked: Any, reply: Any = None) -> Any:
        self.calls.append((name, asked))
        if isinstance(reply, Exception):
            raise reply
        return asked if reply is None else reply

    def _read(self, group: str, consumer: str, streams: dict[str, str], *, count: int, block: int | None) -> Any:
        assert (group, consumer, count) == (self.options.group, self.options.consumer, self.options.batch)
        found = self.reads.pop(0) if self.reads else []
        self._call("read", (streams[RESULT_STREAM], block))
        if isinstance(found, Exception):
            raise found
        return [[b"", found]] if found else found

    def _claim(self, *_: Any, **options: Any) -> Any:
        cursor, found = self.claims.pop(0) if self.claims else (b"0-0", [])
        self._call("claim", (options["min_idle_time"], options["start_id"], options["count"]))
        return [cursor, found]

    def _pipeline(self, *, transaction: bool) -> Any:
        assert not transaction
        names: list[str] = []

        def add(_: str, __: str, **options: Any) -> None:
            self._call("held by", (options["min"], options["max"], options["count"]))
            names.append(options["consumername"].decode())

        return SimpleNamespace(xpending_range=add, execute=lambda: [self.held_by.get(name, []) for name in names])

    def portion(self) -> list[Entry]:
        """The next portion."""
        return run(self.client, self.reader.read_steps())

    def read(self) -> list[str]:
        """The ids of the next portion."""
        return [entry.result.id for entry in self.portion()]

    def hold(self, portion: list[Entry]) -> list[Entry]:
        """The entries that are still held."""
        return run(self.client, self.reader.hold_steps(portion))

    def others_hold_nothing(self) -> bool:
        """Whether other consumers hold nothing."""
        return run(self.client, self.reader._others_hold_nothing_steps())

    def asked(self, name: str) -> list[Any]:
        """What was asked of one command."""
        return [asked for called, asked in self.calls if called == name]

    def skip_own(self) -> None:
        """Read to where new entries begin, and forget what was asked."""
        assert self.read() == []
        self.calls.clear()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A consumer with the arguments above."""
    return Parts(monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"group": ""},
        {"consumer": ""},
        {"batch": 0},
        {"block_s": -1},
        {"reclaim_idle_s": -1},
        {"away_s": -1},
        {"group": "x" * 1001},
    ],
)
def test_invalid_arguments_are_refused(changes: dict[str, Any]) -> None:
    """With the name of the argument."""
    with pytest.raises(RequestError, match=f"^{next(iter(changes))}: "):
        read_options(**(ARGUMENTS | changes))


def test_least_arguments_are_accepted() -> None:
    """A read waits no longer than the client's time-out allows; only a name that was made is temporary."""
    least = {"batch": 1, "block_s": 0, "reclaim_idle_s": 0, "away_s": 0, "group": "g", "consumer": "c"}
    options = read_options(**(ARGUMENTS | least))
    assert (options.batch, options.block_s, options.reclaim_idle_s, options.away_s) == (1, 0.0, 0.0, 0.0)
    assert (options.consumer, options.is_temporary) == ("c", False)
    assert read_options(**(ARGUMENTS | {"block_s": 60})).block_s == 2.5
    made = [read_options(**(ARGUMENTS | {"consumer": None})) for _ in range(2)]
    assert all(each.is_temporary for each in made)
    assert made[0].consumer != made[1].consumer
    assert made[0].away_s is None


def test_own_entries_come_first(parts: Parts) -> None:
    """Portion by portion without a wait; then entries of crashed consumers and new ones in turns."""
    parts.reads = [[entry(1), entry(2)], [entry(3)], [], [entry(4)], [entry(5)]]
    parts.claims = [(b"7-0", [entry(9)]), (b"0-0", [])]
    assert [parts.read() for _ in range(6)] == [["j1", "j2"], ["j3"], [], ["j9"], ["j4"], []]
    assert parts.asked("read") == [("0-0", None), ("2-0", None), ("3-0", None), (">", 500)]
    assert parts.asked("claim") == [(10_000, "0-0", 3), (10_000, "7-0", 3)]
    assert parts.asked("create") == [{"id": "0", "mkstream": True}]


@pytest.mark.parametrize(("block_s", "block_ms"), [(0.0, None), (0.0001, 1), (0.5, 500)])
def test_read_waits_at_least_a_millisecond_or_not(
    monkeypatch: pytest.MonkeyPatch, block_s: float, block_ms: int | None
) -> None:
    """A block of 0 would never end."""
    parts = Parts(monkeypatch, block_s=block_s)
    parts.skip_own()
    parts.read()
    parts.read()
    assert parts.asked("read") == [(">", block_ms)]


def test_answer_is_handed_out_once_in_a_loop_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that comes back by a claim was not acknowledged yet; any other loop gets it again."""
    for stops, expected in ((True, []), (False, ["j1"])):
        parts = Parts(monkeypatch, stop_when_idle=stops)
        parts.reads = [[entry(1)]]
        [item] = parts.portion()
        parts.reader.handed_out(item)
        assert parts.read() == []
        parts.claims = [(b"0-0", [entry(1)])]
        assert parts.read() == expected


@pytest.mark.parametrize(
    ("stops", "claim", "new", "is_at_end"),
    [
        (True, (b"0-0", []), [], True),
        (False, (b"0-0", []), [], False),
        (True, (b"5-0", []), [], False),
        (True, (b"0-0", [entry(1)]), [], False),
        (True, (b"0-0", []), [entry(2)], False),
    ],
)
def test_loop_ends_when_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, stops: bool, claim: Any, new: list[Any], is_at_end: bool
) -> None:
    """Neither new entries nor entries to claim, and only where it is to end."""
    parts = Parts(monkeypatch, stop_when_idle=stops)
    parts.skip_own()
    parts.claims, parts.reads = [claim], [new]
    parts.read()
    assert not parts.reader.is_at_end
    parts.read()
    assert parts.reader.is_at_end is is_at_end


def test_loop_waits_for_what_others_held(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Up to the newest entry of that time; it reads with longer waits meanwhile, and says once whom it waits for."""
    parts = Parts(monkeypatch, stop_when_idle=True, block_s=0.01)
    parts.skip_own()
    consumers = [{"name": b"me"}, {"name": b"other"}, {"name": b"done"}]
    parts.pending = {"pending": 2, "max": b"8-0", "consumers": consumers}
    parts.held_by = {"other": [1]}
    with caplog.at_level(logging.WARNING, logger="shiwu"):
        for _ in range(2):
            parts.read()
            parts.read()
            parts.pending |= {"max": b"99-0"}
    assert not parts.reader.is_at_end
    assert parts.asked("held by") == [("-", "8-0", 1)] * 4
    assert parts.asked("read") == [(">", 10), (">", int(MIN_WAIT_S * 1000))]
    assert caplog.text.count("(other)") == len(caplog.records) == 1
    parts.held_by = {}
    parts.read()
    parts.read()
    assert parts.reader.is_at_end


@pytest.mark.parametrize(("max_block_s", "waited_ms"), [(2.5, 500), (0.1, 100)])
def test_loop_without_waits_waits_for_what_others_held(
    monkeypatch: pytest.MonkeyPatch, max_block_s: float, waited_ms: int
) -> None:
    """Or it would ask Redis without a pause, and longer than a command may take it would get no reply."""
    parts = Parts(monkeypatch, stop_when_idle=True, block_s=0.0, max_block_s=max_block_s)
    parts.skip_own()
    parts.pending = {"pending": 1, "max": b"8-0", "consumers": [{"name": b"other"}]}
    parts.held_by = {"other": [1]}
    for _ in range(4):
        parts.read()
    assert parts.asked("read") == [(">", None), (">", waited_ms)]


def test_loop_ends_where_pending_entries_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where the Redis user may not ask for them."""
    parts = Parts(monkeypatch, stop_when_idle=True)
    parts.pending = {"pending": 2, "max": b"8-0", "consumers": [{"name": b"me"}]}
    assert parts.others_hold_nothing()
    parts.client.xpending = lambda *_: parts._call("pending", 0, NoPermissionError("no"))
    assert parts.others_hold_nothing()
    assert parts.others_hold_nothing()
    assert len(parts.asked("pending")) == 2, "what is refused is not asked again"


def test_idle_time_of_a_held_portion_is_reset(parts: Parts) -> None:
    """After a tenth of the time after which others take it over; what another has is given up."""
    parts.reads = [[entry(1), entry(2)]]
    portion = parts.portion()
    parts.clock.now_s += 1.0
    assert parts.hold(portion) == portion
    parts.clock.now_s += 0.001
    assert parts.hold([]) == []
    assert parts.asked("hold") == []
    parts.held = [b"2-0"]
    assert [item.result.id for item in parts.hold(portion)] == ["j2"]
    assert parts.asked("hold") == [["g", "me", 0, "1-0", "2-0"]]
    assert parts.hold(portion) == portion, "it is recent again"


def test_portion_is_kept_where_it_may_not_be_held(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    """The ACL of an older version lacks the right; that is logged once."""
    parts.reads = [[entry(1)]]
    portion = parts.portion()
    parts.held = NoPermissionError("no")
    for _ in range(2):
        parts.clock.now_s += 2.0
        assert parts.hold(portion) == portion
    assert (len(parts.asked("hold")), len(caplog.records)) == (1, 1)


@pytest.mark.parametrize("reclaim_idle_s", [10.0, 3600.0])
def test_idle_consumers_are_removed_once_in_a_while(monkeypatch: pytest.MonkeyPatch, reclaim_idle_s: float) -> None:
    """After an hour, or after twice the time after which entries are taken over."""
    parts = Parts(monkeypatch, reclaim_idle_s=reclaim_idle_s)
    parts.read()
    parts.clock.now_s += CLEANUP_EVERY_S - 1
    parts.read()
    assert parts.asked("drop") == [["g", "", int(max(CONSUMER_TTL_S, 2 * reclaim_idle_s) * 1000)]]
    parts.clock.now_s += 1
    parts.read()
    assert len(parts.asked("drop")) == 2


@pytest.mark.parametrize("text", ["NOGROUP no such group", "UNBLOCKED the stream", "ERR Error: NOGROUP no"])
def test_deleted_group_is_made_again(parts: Parts, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """And read from its begin; what was read before is still delivered, because no other consumer can get it."""
    monkeypatch.setattr(module, "GROUP_GONE_PAUSE_S", 0.0)
    parts.reads = [[entry(1)]]
    portion = parts.portion()
    parts.calls.clear()
    assert parts.reader.failed(redis.ResponseError(text))
    parts.clock.now_s += 1e6
    assert parts.hold(portion) == portion
    parts.read()
    assert (len(parts.asked("create")), parts.asked("read")) == (1, [("0-0", None)])


@pytest.mark.parametrize("error", [redis.ConnectionError("NOGROUP"), redis.ResponseError("ERR other"), OSError("x")])
def test_entries_of_a_lost_reply_are_read_again(parts: Parts, error: Exception) -> None:
    """Those after the newest that came; while its own old entries are read, it goes on where it was."""
    parts.reads = [[entry(3)], [], [entry(12), entry(7)]]
    parts.read()
    assert not parts.reader.failed(error)
    parts.read()
    parts.claims = [(b"0-0", [entry(2)])]
    parts.read()
    parts.read()
    assert not parts.reader.failed(error)
    parts.calls.clear()
    parts.read()
    assert parts.asked("read") == [("12-0", None)]


def test_lost_reply_before_any_entry_is_read_again(parts: Parts) -> None:
    """From the begin of the stream: it may have delivered the first entries."""
    parts.skip_own()
    parts.reader.failed(redis.ConnectionError("away"))
    parts.read()
    assert parts.asked("read") == [("0-0", None)]


def test_group_that_exists_is_used(parts: Parts) -> None:
    """Any other error of its creation is raised, and it is tried again."""
    errors = [redis.ResponseError("OOM no"), redis.ResponseError("BUSYGROUP exists")]
    made: list[int] = []

    def create(*_: Any, **__: Any) -> None:
        made.append(1)
        raise errors.pop(0)

    parts.client.xgroup_create = create
    with pytest.raises(redis.ResponseError, match="OOM"):
        parts.portion()
    parts.read()
    parts.read()
    assert len(made) == 2


@pytest.mark.parametrize(("consumer", "is_dropped"), [("me", False), (None, True)])
def test_loop_that_ends_gives_up_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, consumer: str | None, *, is_dropped: bool
) -> None:
    """The next consumer gets it immediately; a name that was made for the loop is removed."""
    parts = Parts(monkeypatch, consumer=consumer)
    run(parts.client, parts.reader.leave_steps([]))
    assert parts.calls == [], "there is no group yet"
    parts.reads = [[entry(1), entry(2)]]
    portion = parts.portion()
    parts.calls.clear()
    run(parts.client, parts.reader.leave_steps(portion))
    name = parts.options.consumer
    expected: list[Any] = [("hold", ["g", name, GIVEN_UP_MS, "1-0", "2-0"]), ("drop", ["g", name, 0])]
    assert parts.calls == expected[: 1 + is_dropped]


def test_loop_yields_portions_and_gives_up_their_rest(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in between is waited for, and no item is lost or yielded twice."""
    parts.reads = [[entry(1), entry(2)], redis.ConnectionError("away"), [], [entry(3), entry(4), entry(5)]]
    pauses: list[float] = []
    monkeypatch.setattr(steps, "Event", lambda: SimpleNamespace(wait=pauses.append))
    loop: Any = follow((parts.client,), (parts.client,), parts.options)
    assert [next(loop).result.id for _ in range(3)] == ["j1", "j2", "j3"]
    assert len(pauses) == 1
    parts.calls.clear()
    loop.close()
    assert parts.calls == [("hold", ["g", "me", GIVEN_UP_MS, "4-0", "5-0"])]
