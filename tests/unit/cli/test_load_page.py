"""The page that tells an autoscaler how much work there is."""

from __future__ import annotations

import json
from typing import Any

from shiwu.broker.queue_stats import QueueState
from shiwu.cli.load_page import MAX_AGE_S, LoadPage
from shiwu.client.shard_states import ShardState
from shiwu.contract import Lane
from tests.support.clock import Clock


def shard(index: int, *, is_away: bool = False, workers: tuple[str, ...] = ("a",), **sizes: int) -> ShardState:
    """A shard with so many messages."""
    state = QueueState(
        waiting={Lane.INTERACTIVE: sizes.get("interactive", 0), Lane.BULK: sizes.get("bulk", 0)},
        claimed={Lane.INTERACTIVE: 0, Lane.BULK: sizes.get("claimed", 0)},
        delayed=sizes.get("delayed", 0),
        quarantined=sizes.get("quarantined", 0),
        dead=0,
        workers=workers,
        counters={},
        oldest_age_s={},
    )
    return ShardState(index=index, tag="", slot=None, node="", state=None if is_away else state, error=None)


def get(page: LoadPage, path: str = "/load") -> tuple[str, Any]:
    """The status and the body of a reply."""
    statuses: list[str] = []
    body = page({"PATH_INFO": path}, lambda status, headers: statuses.append(status))  # type: ignore[arg-type, return-value]  # what it uses of it
    return statuses[0], json.loads(b"".join(body))


def test_load_is_the_sum_of_all_shards() -> None:
    """A worker that serves several counts once; delayed jobs need no worker yet."""
    page = LoadPage()
    page.update(
        [
            shard(0, interactive=1, bulk=2, claimed=4, workers=("a", "b")),
            shard(1, bulk=8, quarantined=16, delayed=32, workers=("b", "c")),
        ]
    )
    assert get(page) == (
        "200 OK",
        {"jobs": 31, "interactive": 1, "bulk": 10, "held": 20, "delayed": 32, "workers": 3, "shards_away": 0},
    )


def test_unavailable_shards_count_for_a_while() -> None:
    """With their last sizes. When none has any, there is no number, which is not the number 0."""
    clock = Clock()
    page = LoadPage(clock=clock.monotonic)
    assert get(page)[0].startswith("503")
    page.update([shard(0, bulk=1), shard(1, bulk=2)])
    clock.now_s += MAX_AGE_S - 1
    page.update([shard(0, bulk=4), shard(1, is_away=True)])
    assert (get(page)[1]["jobs"], get(page)[1]["shards_away"]) == (6, 1)
    clock.now_s += 2
    page.update([shard(0, bulk=8), shard(1, is_away=True)])
    assert (get(page)[1]["jobs"], get(page)[1]["shards_away"]) == (8, 1)
    clock.now_s += MAX_AGE_S
    assert get(page)[0].startswith("503"), "a sweep that hangs counts nothing either"


def test_other_paths_are_unknown() -> None:
    """Also the metrics, where their library is not installed."""
    page = LoadPage()
    assert [get(page, path)[0] for path in ("/", "/metrics", "/load/x")] == ["404 Not Found"] * 3
