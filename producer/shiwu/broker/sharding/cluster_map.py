"""Which node of a cluster has which slot, as the nodes themselves say."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import chain
from math import inf
from typing import Any, Final, TypeAlias

import redis

from shiwu.broker.redis_errors import info_of

REFRESH_S: Final = 1.0
"""A new connection asks for the map again if the last request is at least that old."""
MAX_ASKED: Final = 16
"""How many nodes one request asks at most, one after the other."""
Node: TypeAlias = tuple[str, int]
"""Host and port."""
AskNode: TypeAlias = Callable[[Node, float], Any]
"""Asks a node for CLUSTER SLOTS within a number of seconds."""


class ClusterMap:
    """The primaries of all slots. All shards of a process share one; its methods may be called from any thread.

    Only a new connection needs it, so it is not refreshed in the background.

    Args:
        seeds: nodes that are asked first.
        ask: sends CLUSTER SLOTS to one node.
        timeout_s: how long one request may take, over all nodes that it asks.
    """

    def __init__(self, seeds: Sequence[Node], *, ask: AskNode, timeout_s: float) -> None:
        self._nodes = list(seeds)
        self._seeds = tuple(seeds)
        self._ask = ask
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._asked_s = -inf
        self._sent_by: Node | None = None
        """The node that sent the map."""
        self._failure: redis.RedisError | None = None
        self._starts: list[int] = []
        self._ranges: list[tuple[int, Node]] = []
        """The last slot and the primary of each range of slots, in the order of `_starts`."""
        self._moved: dict[int, Node] = {}

    def primary_of(self, slot: int) -> Node:
        """Host and port of the primary that has this slot.

        Raises:
            redis.ConnectionError: no node answers in time, or no node has the slot.
            redis.RedisError: the nodes refuse to answer.
        """
        lock = self._own_lock()
        if not lock.acquire(timeout=self._timeout_s):
            raise redis.ConnectionError("expected the nodes of the cluster to name their slots in time")
        try:
            if time.monotonic() - self._asked_s >= REFRESH_S:
                self._refresh()
            found = self._find(slot)
        finally:
            lock.release()
        if found is None:
            self.distrust()
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            raise redis.ConnectionError(
                f"expected a primary for slot {slot}, got none from the nodes of the cluster; wait for the failover, "
                "or give the slot to a node"
            )
        return found

    def has_moved(self, slot: int, node: Node) -> None:
        """Remember what a node said about the place of a slot, until the map is asked for again."""
        with self._own_lock():
            self._moved[slot] = node

    def distrust(self) -> None:
        """Ask the others first next time: a node that is cut off from them, or not one of them, has an old map."""
        with self._own_lock():
            if self._sent_by in self._nodes:
                self._put_last(self._sent_by)

    def _own_lock(self) -> threading.Lock:
        if self._pid != os.getpid():
            # Another thread of the parent process may have held the lock at the fork.
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock

    def _find(self, slot: int) -> Node | None:
        if slot in self._moved:
            return self._moved[slot]
        position = bisect_right(self._starts, slot) - 1
        if position < 0 or self._ranges[position][0] < slot:
            return None
        return self._ranges[position][1]

    def _refresh(self) -> None:
        """Ask one node after the other. If none answers, the last map stays in use."""
        until_s = time.monotonic() + self._timeout_s
        # One node that hangs leaves time for two others.
        share_s = self._timeout_s / 3
        self._failure = None
        for node in self._nodes[:MAX_ASKED]:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                self._read(self._ask(node, min(share_s, left_s)), asked=node)
            except (redis.RedisError, OSError) as error:
                self._fail(node, error)
            else:
                break
        self._asked_s = time.monotonic()

    def _fail(self, node: Node, error: redis.RedisError | OSError) -> None:
        """Ask this node last from now on. An error that only the operator can remove is the one to report."""
        self._put_last(node)
        if not isinstance(error, redis.RedisError):
            error = redis.ConnectionError(f"{node[0]}:{node[1]}: {error}")
        if self._failure is None or (info_of(self._failure).is_temporary and not info_of(error).is_temporary):
            self._failure = error

    def _put_last(self, node: Node) -> None:
        self._nodes.remove(node)
        self._nodes.append(node)

    def _read(self, reply: Any, *, asked: Node) -> None:
        """Take over a reply to CLUSTER SLOTS: `[first, last, [host, port, …], replicas…]` for each range."""
        ranges = sorted(
            (int(first), int(last), [_node(each, asked) for each in nodes]) for first, last, *nodes in reply
        )
        self._starts = [first for first, _, _ in ranges]
        self._ranges = [(last, nodes[0]) for _, last, nodes in ranges]
        self._moved.clear()
        self._failure = None
        self._sent_by = asked
        known = dict.fromkeys(chain([asked], self._seeds, *(nodes for _, _, nodes in ranges)))
        self._nodes = list(known)


def _node(fields: Sequence[Any], asked: Node) -> Node:
    """A node names no host where it has none to prefer; then the one that was asked is right."""
    host = fields[0].decode() if isinstance(fields[0], bytes) else fields[0] or ""
    return (asked[0] if host in {"", "?"} else host, int(fields[1]))
