"""Lane watch: tells which shards of a cluster have messages, over one connection for each node.

`EXISTS` asks for the lanes of a shard. Where this worker watches the shard, `CLIENT TRACKING` then lets the node notify
the connection of their next change, as `LaneNotifier` does on one server. The lanes of the other shards are looked at
in rounds, without tracking, so that a message does not wake every worker.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis
import structlog

from shiwu.contract import Lane
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu.broker.sharding import ClusterNodes, Shard
    from shiwu_worker.errors import FatalError

log: FilteringBoundLogger = structlog.get_logger()
SWEEP_S: Final = 5.0
"""A watched shard is looked at after this time, also where its node notified of nothing: a connection may be lost."""
PLACE_PAUSE_S: Final = 1.0
"""Before the node of a shard is looked for again, after an error of Redis, which the next claim reports."""


class DryShard(Protocol):
    """What the watch needs of `ShardClaims`."""

    def dry_lanes(self) -> Collection[Lane]:
        """The lanes without messages; none while the shard is not to be looked at."""

    def note_messages_in(self, lanes: Collection[Lane]) -> None:
        """Note that these lanes may have messages."""


@dataclass(slots=True)
class _Look:
    """The last look at a shard."""

    at_s: float = -math.inf
    lanes: frozenset[Lane] = frozenset()
    is_tracked: bool = False
    """Whether the node notifies of the next change of these lanes."""


class LaneWatch:
    """Finds the node of each shard, and has one thread for each node. Its methods may be called from any thread.

    Args:
        shards: the shards, in the order of their indexes, each with the object that is notified of its messages.
        lanes: those that the worker serves; others are never looked at.
        is_watched: whether the node of a shard is to notify this worker.
        round_pause_s: pause between two looks at a shard that is not watched.
        on_fatal: called when a thread ends by a defect.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Shard, DryShard]],
        nodes: ClusterNodes,
        *,
        lanes: Collection[Lane],
        is_watched: Callable[[int], bool],
        round_pause_s: Callable[[], float],
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self.shards = shards
        self.nodes = nodes
        self._lanes = frozenset(lanes)
        self.is_watched = is_watched
        self.round_pause_s = round_pause_s
        self.on_fatal = on_fatal
        self.closed = threading.Event()
        self._by_prefix = {shard.prefix.encode(): shard.index for shard, _ in shards}
        self._changed = threading.Condition()
        self._unplaced = {shard.index for shard, _ in shards}
        self._watches: dict[tuple[str, int], _NodeWatch] = {}
        self.thread = ServiceThread("lanes", self._run, on_fatal=on_fatal, stop=self.close)

    def wake(self) -> None:
        """Look again, because this worker watches other shards."""
        with self._changed:
            for watch in self._watches.values():
                watch.wake()

    def look_at(self, index: int) -> None:
        """Look at a shard with lanes that have no messages, unless its node would notify of some."""
        with self._changed:
            for watch in self._watches.values():
                look = watch.looks.get(index)
                if look is not None and not (look.is_tracked and look.lanes.issuperset(self.dry_lanes(index))):
                    watch.wake()

    def dry_lanes(self, index: int) -> frozenset[Lane]:
        """The lanes of a shard to look at."""
        return self._lanes.intersection(self.shards[index][1].dry_lanes())

    def close(self) -> None:
        """Let all threads end."""
        self.closed.set()
        with self._changed:
            self._changed.notify_all()
        self.wake()

    # -------------------------------------------------------------------------------- for the threads of the nodes
    def index_of(self, key: bytes) -> int | None:
        """The shard of a key."""
        return self._by_prefix.get(key[: key.find(b"}:") + 2])

    def leave(self, indexes: Collection[int]) -> None:
        """Look for the node of these shards again. Until then they are asked for messages by a claim."""
        with self._changed:
            for watch in self._watches.values():
                watch.forget(indexes)
            self._unplaced.update(indexes)
            self._changed.notify_all()
        for index in indexes:
            _, dry = self.shards[index]
            dry.note_messages_in(dry.dry_lanes())

    def end_if_empty(self, watch: _NodeWatch) -> bool:
        """Forget a node without shards."""
        with self._changed:
            if watch.looks:
                return False
            del self._watches[watch.node]
            return True

    # -------------------------------------------------------------------------------- on the thread
    def _run(self) -> None:
        while not self.closed.is_set():
            with self._changed:
                unplaced = sorted(self._unplaced)
            for index in unplaced:
                self._place(index)
            with self._changed:
                if not self._unplaced:
                    self._changed.wait_for(lambda: bool(self._unplaced) or self.closed.is_set(), SWEEP_S)
            self.closed.wait(PLACE_PAUSE_S if unplaced else 0.0)

    def _place(self, index: int) -> None:
        try:
            node = self.nodes.node_of(self.shards[index][0])
        except redis.RedisError:
            return
        with self._changed:
            self._unplaced.discard(index)
            watch = self._watches.get(node)
            if watch is None:
                watch = self._watches[node] = _NodeWatch(self, node, number=len(self._watches))
                watch.add(index)
                watch.thread.start()
            else:
                watch.add(index)


class _NodeWatch:
    """The watch over the shards of one node, on a thread that ends when there are none."""

    def __init__(self, owner: LaneWatch, node: tuple[str, int], *, number: int) -> None:
        self.node = node
        self.looks: dict[int, _Look] = {}
        """Shard → the last look at it. Replaced under the owner's lock, never changed."""
        self._owner = owner
        self._tracking: Any = None
        self._plain: Any = None
        self._can_track = True
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake)
        self.thread = ServiceThread(f"lanes-{number}", self._run, on_fatal=owner.on_fatal, stop=self.wake)

    # -------------------------------------------------------------------------------- from any thread
    def add(self, index: int) -> None:
        """Look at this shard too. Called under the owner's lock."""
        self.looks = {**self.looks, index: _Look()}
        self.wake()

    def forget(self, indexes: Collection[int]) -> None:
        """Look at these shards no more. Called under the owner's lock."""
        self.looks = {index: look for index, look in self.looks.items() if index not in indexes}

    def wake(self) -> None:
        """End the wait of the thread."""
        os.eventfd_write(self._wake, 1)

    # -------------------------------------------------------------------------------- on the thread
    def _run(self) -> None:
        try:
            while not self._owner.closed.is_set() and not self._owner.end_if_empty(self):
                looks = self.looks
                try:
                    until_s = self._look(looks)
                    self._wait(until_s)
                except (redis.RedisError, OSError):
                    self._disconnect()
                    self._owner.leave(looks)
        finally:
            self._disconnect()

    def _look(self, looks: Mapping[int, _Look]) -> float:
        """Look at the shards whose time has come; returns when the next one is due."""
        now_s, until_s = time.monotonic(), math.inf
        watched: dict[int, frozenset[Lane]] = {}
        others: dict[int, frozenset[Lane]] = {}
        for index, look in looks.items():
            lanes = self._owner.dry_lanes(index)
            if not lanes:
                continue
            is_watched = self._can_track and self._owner.is_watched(index)
            if not is_watched:
                due_s = look.at_s + self._owner.round_pause_s()
            else:
                due_s = look.at_s + SWEEP_S if look.is_tracked and lanes <= look.lanes else now_s
            if due_s > now_s:
                until_s = min(until_s, due_s)
                continue
            look.at_s, look.lanes, look.is_tracked = now_s, lanes, is_watched
            (watched if is_watched else others)[index] = lanes
            until_s = min(until_s, now_s + (SWEEP_S if is_watched else self._owner.round_pause_s()))
        if watched:
            self._tracking = self._tracking or self._track(self._owner.nodes.connect(self.node))
            self._ask(self._tracking, watched)
        if others:
            self._plain = self._plain or self._owner.nodes.connect(self.node)
            self._ask(self._plain, others)
        return until_s

    def _track(self, connection: Any) -> Any:
        """Let the node notify this connection of changes of what it reads."""
        connection._parser.set_invalidation_push_handler(self._note_push)  # redis-py has no public name
        connection.send_command("CLIENT", "TRACKING", "ON", check_health=False)
        try:
            connection.read_response()
        except redis.ResponseError as error:
            self._can_track = False
            log.warning("lane_tracking_refused", error=str(error)[:300], poll_interval_s=self._owner.round_pause_s())
        return connection

    def _note_push(self, push: Sequence[Any]) -> Sequence[Any]:
        """A change may come between the replies for several shards, so this is called by the reader of replies."""
        keys = push[1]
        indexes = self.looks if keys is None else {self._owner.index_of(key) for key in keys}
        for index, look in self.looks.items():
            if index in indexes:
                look.is_tracked = False
        return push

    def _ask(self, connection: Any, lanes_of: Mapping[int, frozenset[Lane]]) -> None:
        """Ask for the lanes of these shards in one round trip, and pass on which have messages."""
        shards = self._owner.shards
        commands = [
            ("EXISTS", *(f"{shards[index][0].prefix}{key}" for lane in lanes for key in lane.keys))
            for index, lanes in lanes_of.items()
        ]
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        moved: list[int] = []
        failure: redis.RedisError | None = None
        for index, lanes in lanes_of.items():
            try:
                is_found = int(connection.read_response()) > 0
            except redis.ResponseError as error:
                if self._owner.nodes.has_moved(error, shard=shards[index][0], node=self.node):
                    moved.append(index)
                else:
                    failure = error
                continue
            if is_found:
                if look := self.looks.get(index):
                    look.is_tracked = False
                shards[index][1].note_messages_in(lanes)
        if failure is not None:
            raise failure
        if moved:
            self._owner.leave(moved)

    def _wait(self, until_s: float) -> None:
        """Wait for notifications, for `wake`, or until the time has come."""
        connection = self._tracking
        if connection is None or not connection.can_read(0):
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if connection is not None:
                poll.register(connection._sock.fileno(), select.POLLIN)  # redis-py has no public name
            poll.poll(max(0.0, min(SWEEP_S, until_s - time.monotonic())) * 1000)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while connection is not None and connection.can_read(0):
            connection.read_response(push_request=True)

    def _disconnect(self) -> None:
        for connection in (self._tracking, self._plain):
            if connection is not None:
                connection.disconnect()
        self._tracking = self._plain = None
