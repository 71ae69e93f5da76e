"""The map of a cluster: which nodes are asked, how often, and what is believed."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from shiwu.broker.sharding import cluster_map
from shiwu.broker.sharding.cluster_map import ClusterMap, Node
from tests.support.clock import Clock

A, B, C = ("a", 1), ("b", 2), ("c", 3)


class Nodes:
    """Nodes that answer CLUSTER SLOTS, or raise."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.asked: list[tuple[Node, float]] = []
        self.replies: dict[Node, Any] = {}

    def ask(self, node: Node, timeout_s: float) -> Any:
        """Answer, or take the whole time and fail."""
        self.asked.append((node, timeout_s))
        reply = self.replies.get(node, redis.TimeoutError("no answer"))
        if isinstance(reply, redis.TimeoutError):
            self.clock.now_s += timeout_s
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Nodes on a clock that stands still."""
    clock = Clock()
    monkeypatch.setattr(cluster_map, "time", clock)
    return Nodes(clock)


def map_of(nodes: Nodes) -> ClusterMap:
    """A map with two seeds and three seconds for a request."""
    return ClusterMap([A, B], ask=nodes.ask, timeout_s=3)


def test_primary_has_the_slots_of_its_range(nodes: Nodes) -> None:
    """Replicas are no primaries, ranges come in any order, and a slot without a node is an error."""
    nodes.replies[A] = [[100, 199, [b"b", 2, b"id"], [b"c", 3, b"id"]], [0, 50, [b"a", 1, b"id"]]]
    found = map_of(nodes)
    assert [found.primary_of(slot) for slot in (0, 50, 100, 199)] == [A, A, B, B]
    for slot in (51, 99, 200):
        with pytest.raises(redis.ConnectionError, match=f"a primary for slot {slot}"):
            found.primary_of(slot)
    assert len(nodes.asked) == 1


@pytest.mark.parametrize("host", [b"", None, b"?"])
def test_node_without_a_host_is_where_it_was_asked(nodes: Nodes, host: bytes | None) -> None:
    """As a cluster behind an address translation says it."""
    nodes.replies[A] = [[0, 99, [host, 7, b"id"]]]
    assert map_of(nodes).primary_of(0) == ("a", 7)


def test_map_is_asked_for_once_a_second(nodes: Nodes) -> None:
    """Also while all nodes are away: shards that connect together wait once."""
    found = map_of(nodes)
    for _ in range(3):
        with pytest.raises(redis.TimeoutError):
            found.primary_of(0)
    assert [node for node, _ in nodes.asked] == [A, B]
    nodes.clock.now_s += cluster_map.REFRESH_S
    nodes.replies[B] = [[0, 99, [b"b", 2, b"id"]]]
    assert [found.primary_of(slot) for slot in range(5)] == [B] * 5
    assert len(nodes.asked) <= 4


def test_request_ends_in_time(nodes: Nodes) -> None:
    """Each node that hangs takes a third of it, and is asked last the next time."""
    found = ClusterMap([A, B, C, ("d", 4)], ask=nodes.ask, timeout_s=3)
    with pytest.raises(redis.TimeoutError):
        found.primary_of(0)
    assert nodes.asked == [(A, 1), (B, 1), (C, 1)]
    nodes.clock.now_s += cluster_map.REFRESH_S
    nodes.replies[("d", 4)] = [[0, 99, [b"c", 3, b"id"]]]
    assert found.primary_of(0) == C
    assert nodes.asked[3:] == [(("d", 4), 1)]


def test_last_map_stays_in_use_while_no_node_answers(nodes: Nodes) -> None:
    """The primary itself may be reachable, and its error says more."""
    nodes.replies[A] = [[0, 99, [b"c", 3, b"id"]]]
    found = map_of(nodes)
    assert found.primary_of(0) == C
    nodes.replies.clear()
    nodes.clock.now_s += cluster_map.REFRESH_S
    assert found.primary_of(0) == C
    nodes.clock.now_s += cluster_map.REFRESH_S
    nodes.replies[C] = [[0, 99, [b"b", 2, b"id"]]]
    assert found.primary_of(0) == B, "expected that nodes of the map are asked beside the seeds"


def test_place_that_a_node_names_holds_until_the_next_map(nodes: Nodes) -> None:
    """So the next connection is right although the map is not asked for yet."""
    nodes.replies[A] = [[0, 99, [b"a", 1, b"id"]]]
    found = map_of(nodes)
    assert found.primary_of(5) == A
    found.has_moved(5, B)
    assert [found.primary_of(slot) for slot in (4, 5)] == [A, B]
    nodes.clock.now_s += cluster_map.REFRESH_S
    assert found.primary_of(5) == A


@pytest.mark.parametrize("is_first", [True, False])
def test_error_that_the_operator_must_remove_is_reported(nodes: Nodes, is_first: bool) -> None:
    """A wrong password says more than a node that is away, whichever comes first."""
    nodes.replies[A if is_first else B] = redis.AuthenticationError("WRONGPASS")
    nodes.replies[B if is_first else A] = redis.ConnectionError("refused")
    with pytest.raises(redis.AuthenticationError):
        map_of(nodes).primary_of(0)


def test_error_of_a_socket_names_the_node(nodes: Nodes) -> None:
    """It becomes an error of the connection, which callers know."""
    nodes.replies |= {A: OSError("no route"), B: OSError("no route")}
    with pytest.raises(redis.ConnectionError, match="a:1: no route"):
        map_of(nodes).primary_of(0)


def test_map_is_free_after_a_fork(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may have asked for it meanwhile; in the new process that thread does not exist."""
    nodes.replies[A] = [[0, 199, [b"a", 1, b"id"]]]
    found = map_of(nodes)
    found._lock.acquire()
    monkeypatch.setattr(cluster_map.os, "getpid", lambda: -1)
    assert found.primary_of(0) == A
    found.has_moved(0, B)
    assert found.primary_of(0) == B


def test_node_whose_map_proved_wrong_is_asked_last(nodes: Nodes) -> None:
    """As one that is cut off from the others, and does not know that a replica has taken over its slots."""
    nodes.replies[A] = [[0, 99, [b"a", 1, b"id"]]]
    nodes.replies[B] = [[0, 99, [b"c", 3, b"id"]]]
    found = map_of(nodes)
    assert found.primary_of(0) == A
    found.distrust()
    found.distrust()
    assert found.primary_of(0) == A
    for _ in range(2):
        nodes.clock.now_s += cluster_map.REFRESH_S
        assert found.primary_of(0) == C
    assert [node for node, _ in nodes.asked] == [A, B, B]


def test_node_that_knows_no_primary_is_asked_last(nodes: Nodes) -> None:
    """As one that has left the cluster and is still named by the URL."""
    nodes.replies[A] = []
    nodes.replies[B] = [[0, 99, [b"c", 3, b"id"]]]
    found = map_of(nodes)
    with pytest.raises(redis.ConnectionError, match="a primary for slot 0"):
        found.primary_of(0)
    nodes.clock.now_s += cluster_map.REFRESH_S
    assert found.primary_of(0) == C
