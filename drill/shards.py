"""A drill on a cluster: primaries are killed and frozen and slots are moved while jobs come at a steady rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from redis import RedisError
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

from drill.drill_run import DrillRun, Outcome, stream_entries, wrong
from shiwu.broker.message_writer import build_message
from shiwu.broker.server_clock import server_time_ms
from shiwu.broker.sharding import PoolOptions, ShardRedis, open_shards, shard_of
from shiwu.contract import RESULT_STREAM, Lane, Request

SHARDS: Final = 6
PRIMARIES: Final = 3
REPLICAS: Final = 3
CONFIG: Final = {"appendonly": "yes", "cluster-node-timeout": "3000"}
"""After 3 s without a reply a replica takes over; in a shorter time a busy machine may not reply."""
RESUME_S: Final = 20.0
"""Promised: a shard answers jobs so long after its primary was killed, hung or passed the slot on."""
ATOMIC_MOVES: Final = 2
"""In each round, besides one move key by key."""
RETRY_S: Final = 0.2
MAX_SLOWDOWN: Final = 1.5
"""Promised: p95 of the other shards while a node is frozen ÷ p95 before."""
EXACT_FROM_S: Final = 20.0
"""From this length on, p95 of a freeze is compared with the promise; in less there are too few jobs."""


def shards(run: DrillRun) -> Outcome:
    """Jobs come each second on six shards: primaries are killed and frozen, slots move in one step and key by key."""
    cluster: ValkeyCluster = run.server
    workers = run.start_workers(2 if run.rounds == 1 else 3, commit_replicas=1)
    drill = _ShardDrill(run, cluster)
    with drill.load():
        for _ in range(run.rounds):
            drill.measure(run.lasts_s, "before", among=range(SHARDS))
            drill.kill_primary()
            for _ in range(ATOMIC_MOVES):
                drill.move(cluster.move_atomically)
            drill.move(drill.move_by_key)
            drill.freeze(run.lasts_s)
    p95 = {name: _p95(drill.latencies(name)) for name in ("before", "frozen")}
    ratio = p95["frozen"] / max(p95["before"], 1.0)
    notes = (
        f"{ATOMIC_MOVES * run.rounds} atomic moves, {run.rounds} by key, {run.rounds} failovers; other shards' p95 "
        f"{p95['before']:.0f} ms before, {p95['frozen']:.0f} ms in freezes of {run.lasts_s:g} s, × {ratio:.2f}"
    )
    outcome = run.finish("shards", promised_s=RESUME_S, notes=notes)
    if run.lasts_s >= EXACT_FROM_S and ratio > MAX_SLOWDOWN:
        outcome = wrong(outcome, f"other shards were {ratio:.2f} times as slow, promised {MAX_SLOWDOWN}")
    ended = [worker.name for worker in workers if not worker.is_running]
    return wrong(outcome, f"ended: {ended}") if ended else outcome


@dataclass
class _Sender:
    """Jobs of one shard, one after the other; a job that was not confirmed is sent again with its id."""

    run: DrillRun
    client: ShardRedis
    ids: Iterator[str]
    every_s: float
    sent_ms: dict[str, float] = field(default_factory=dict)
    """Id → the time at which it was first sent, in milliseconds of the servers' clock."""

    def loop(self, stop: threading.Event) -> None:
        """Send until told to stop, and then until the last job is confirmed."""
        next_s = time.monotonic()
        while not stop.wait(max(0.0, next_s - time.monotonic())):
            # A sender that was held up does not send all that it missed.
            next_s = max(next_s + self.every_s, time.monotonic())
            job_id = next(self.ids)
            while not self._send(job_id):
                time.sleep(RETRY_S)  # the node is being replaced, or the slot moves

    def _send(self, job_id: str) -> bool:
        """Whether a replica has confirmed the job."""
        lane = Lane.INTERACTIVE if int(job_id.rpartition("-")[2]) % 4 == 0 else Lane.BULK
        image = self.run.images[len(self.sent_ms) % len(self.run.images)]
        try:
            sent_ms = server_time_ms(self.client)
            message = build_message(Request(image=image), job_id=job_id, lane=lane, sent_ms=sent_ms)
            self.sent_ms.setdefault(job_id, sent_ms)
            with self.client.pipeline(transaction=False) as pipe:
                pipe.lpush(lane.queue, message)
                pipe.execute_command("WAIT", 1, 2000)  # type: ignore[no-untyped-call]  # redis' own
                return bool(int(pipe.execute()[1]) >= 1)
        except RedisError:
            return False


class _ShardDrill:
    """The cluster, what is sent to it, and the faults."""

    def __init__(self, run: DrillRun, cluster: ValkeyCluster) -> None:
        self.run = run
        self.cluster = cluster
        options = PoolOptions(timeout_s=2.0)
        self.clients = open_shards(run.url, options)
        for client in self.clients:
            run.enter(client)
        every_s = SHARDS / run.jobs
        self._senders = [
            _Sender(run, client, self._ids(index), every_s=every_s)
            for index, client in enumerate(open_shards(run.url, options))
        ]
        for sender in self._senders:
            run.enter(sender.client)
        self._windows: list[tuple[str, float, float, Collection[int]]] = []
        """Name, first and last millisecond, and shards of what was measured."""

    def _ids(self, shard: int) -> Iterator[str]:
        number = 0
        while True:
            if shard_of(job_id := f"{self.run.prefix}-{number}", shards=SHARDS) == shard:
                yield job_id
            number += 1

    @contextmanager
    def load(self) -> Iterator[None]:
        """Send jobs to all shards; afterwards every job is expected to be answered."""
        stop = threading.Event()
        threads = [threading.Thread(target=sender.loop, args=(stop,)) for sender in self._senders]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(timeout=120)
            self.run.note([job_id for sender in self._senders for job_id in sender.sent_ms])

    def measure(self, lasts_s: float, name: str, *, among: Collection[int]) -> None:
        """Let time pass, whose jobs in these shards are measured under a name."""
        begin_ms = time.time() * 1000
        time.sleep(lasts_s)  # the measurement itself
        self._windows.append((name, begin_ms, time.time() * 1000, among))

    def latencies(self, name: str) -> list[float]:
        """Milliseconds from the first sending to the answer in the stream, for the jobs of all windows of a name."""
        found = []
        for shard, client in enumerate(self.run.clients):
            sent_ms = self._senders[shard].sent_ms
            windows = [(begin, end) for each, begin, end, among in self._windows if each == name and shard in among]
            for entry_id, fields in stream_entries(client):
                at_ms = sent_ms.get(fields[b"id"].decode(), 0.0)
                if any(begin <= at_ms <= end for begin, end in windows):
                    found.append(int(entry_id.partition(b"-")[0]) - at_ms)
        return found

    def kill_primary(self) -> None:
        """SIGKILL of the primary of a random shard; its replica takes over, and it comes back as a replica."""
        shard = self.run.rng.randrange(SHARDS)
        killed = self._owner(shard)
        hit = [each for each in range(SHARDS) if self._owner(each) == killed]
        before = {each: self._length(each) for each in hit}
        with self._recovery(before):
            self.cluster.server(killed).kill()
            wait_until(
                lambda: self.cluster.owner(self._slot(shard)) not in {killed, 0}, timeout_s=60, what="a failover"
            )
            # Writes wait for a replica, and the only other node is this one.
            self.cluster.server(killed).start()
        self.cluster.wait_complete()

    def move(self, move: Callable[..., None]) -> None:
        """Move the slot of a random shard to another primary."""
        shard = self.run.rng.randrange(SHARDS)
        target = self.run.rng.choice(sorted(self.cluster.primaries() - {self._owner(shard)}))
        with self._recovery({shard: self._length(shard)}):
            move(self._slot(shard), to=target)

    def move_by_key(self, slot: int, *, to: int) -> None:
        """As Redis and older versions of Valkey move slots."""
        source = self.cluster.begin_move(slot, to=to)
        for _ in range(3):
            self.cluster.move_keys(slot, source=source, to=to, most=3)
            time.sleep(RETRY_S)  # jobs come and go while the slot has keys on both nodes
        self.cluster.end_move(slot, source=source, to=to)

    def freeze(self, lasts_s: float) -> None:
        """SIGSTOP of a primary and its replica, so that no other node takes over; the other shards are measured."""
        nodes = self.cluster.nodes_of(self._slot(self.run.rng.randrange(SHARDS)))
        owners = {shard: self._owner(shard) for shard in range(SHARDS)}
        hit = [shard for shard, port in owners.items() if port == nodes[0]]
        before = {shard: self._length(shard) for shard in hit}
        with _frozen(self.cluster, nodes):
            self.measure(lasts_s, "frozen", among=set(owners) - set(hit))
        with self._recovery(before):
            pass
        self.cluster.wait_complete()

    @contextmanager
    def _recovery(self, before: dict[int, int]) -> Iterator[None]:
        """A fault; its recovery lasts from its beginning until each of these shards has more answers than before."""
        began_s = time.monotonic()
        yield
        wait_until(
            partial(self._all_grew, before), timeout_s=60, every_s=0.02, what="answers of the shards that were hit"
        )
        self.run.recoveries.append(time.monotonic() - began_s)

    def _slot(self, shard: int) -> int:
        return self.clients[shard].shard.slot or 0

    def _owner(self, shard: int) -> int:
        return self.cluster.owner(self._slot(shard))

    def _length(self, shard: int) -> int:
        return int(self.run.clients[shard].xlen(RESULT_STREAM))

    def _all_grew(self, before: dict[int, int]) -> bool:
        """Whether each of these shards has more answers than before."""
        found: dict[int, Any] = {}
        for shard in before:
            with suppress(RedisError):
                found[shard] = self.clients[shard].xlen(RESULT_STREAM)
        return all(found.get(shard, 0) > length for shard, length in before.items())


@contextmanager
def _frozen(cluster: ValkeyCluster, nodes: Sequence[int]) -> Iterator[None]:
    """Nodes that are frozen now."""
    for port in nodes:
        cluster.server(port).pause()
    try:
        yield
    finally:
        for port in nodes:
            cluster.server(port).resume()


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)] if values else 0.0
