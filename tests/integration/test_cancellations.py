"""The listener for jobs that another process answered, over a real Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import redis

from shiwu.contract import ANSWERED_CHANNEL
from shiwu_worker.errors import FatalError
from shiwu_worker.pipeline.cancellations import MAX_IDS, CancellationListener
from tests.support.servers import Valkey
from tests.support.waiting import wait_until


class Heard:
    """What a listener passes on."""

    def __init__(self, url: str) -> None:
        self.calls: list[list[str]] = []
        self.fatal: list[FatalError] = []
        self.client = redis.Redis.from_url(url, socket_timeout=10)
        self.error: Exception | None = None
        self.listener = CancellationListener(self.client, on_answered_elsewhere=self._note, on_fatal=self.fatal.append)

    def _note(self, ids: Sequence[str]) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(list(ids))

    @property
    def ids(self) -> list[str]:
        """All ids, in their order."""
        return [job_id for call in self.calls for job_id in call]


@pytest.fixture
def heard(valkey: Valkey) -> Iterator[Heard]:
    """A listener that runs on a server of its own."""
    made = Heard(valkey.url)
    made.listener.start()
    wait_until(lambda: subscribers(valkey) == 1, timeout_s=10)
    yield made
    made.listener.close()
    made.client.close()


def subscribers(valkey: Valkey) -> int:
    """How many listen to the channel."""
    with valkey.client() as client:
        [(_, count)] = client.pubsub_numsub(ANSWERED_CHANNEL)
    return int(count)


def test_ids_are_passed_on_in_order_and_portions(valkey: Valkey, heard: Heard) -> None:
    """Many that wait make few calls, each of a limited size; bytes that are no text are passed on too."""
    ids = [f"job-{number}" for number in range(2 * MAX_IDS + 10)]
    with valkey.client() as client:
        with client.pipeline(transaction=True) as pipe:
            for job_id in ids:
                pipe.publish(ANSWERED_CHANNEL, job_id)
            pipe.execute()
        wait_until(lambda: len(heard.ids) == len(ids), timeout_s=10)
        assert heard.ids == ids
        assert all(0 < len(call) <= MAX_IDS for call in heard.calls)
        client.publish(ANSWERED_CHANNEL, b"\xff")
    wait_until(lambda: heard.ids[-1] == "\ufffd", timeout_s=10)


def test_listener_comes_back_after_its_connection_is_cut(valkey: Valkey, heard: Heard) -> None:
    """Redis being away ends neither the thread nor the worker."""
    with valkey.client() as client:
        client.client_kill_filter(_type="pubsub")

        def is_heard_again() -> bool:
            # Again and again: the server may still count the subscription of the connection that it has closed.
            client.publish(ANSWERED_CHANNEL, "after")
            return bool(heard.ids)

        wait_until(is_heard_again, timeout_s=20, every_s=0.1)
    assert set(heard.ids) == {"after"}
    assert heard.fatal == []


def test_defect_of_the_receiver_is_fatal(valkey: Valkey, heard: Heard) -> None:
    """A thread that has ended would receive nothing more."""
    heard.error = IndexError("a defect")
    with valkey.client() as client:
        client.publish(ANSWERED_CHANNEL, "one")
    wait_until(lambda: heard.fatal, timeout_s=10)


def test_listener_ends_when_closed(valkey: Valkey, heard: Heard) -> None:
    """With its connection."""
    heard.listener.close()
    wait_until(lambda: not heard.listener.thread.is_alive, timeout_s=10)
    wait_until(lambda: subscribers(valkey) == 0, timeout_s=10)
    assert heard.fatal == []
