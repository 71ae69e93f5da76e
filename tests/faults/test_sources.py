"""A source that is away for a while: tried again with a delay, and given up aloud in the end."""

from __future__ import annotations

import time

from shiwu.broker.message_reader import read_message
from shiwu.contract import ATTEMPTS, CLAIMS, DEAD_MESSAGES, DELAYED, Status
from tests.faults.conftest import Fleet
from tests.support import pictures
from tests.support.ask import ask
from tests.support.picture_server import PictureServer, Reply
from tests.support.servers import WorkerProcess

LATER = '"event": "job_retried"'


def test_a_source_that_comes_back_and_one_that_does_not(
    fleet: Fleet, near: WorkerProcess, http_server: PictureServer
) -> None:
    """The first is tagged at its second attempt; the second ends as `failed`, and its message is kept."""
    said, client = near.log_text().count(LATER), fleet.client
    good = Reply.picture(pictures.jpeg(pictures.picture()))
    back = http_server.serve("/back.jpg", *[Reply.error(503)] * 3, good)
    away = http_server.serve("/away.jpg", Reply.error(503))
    tagged = ask(fleet.url, back, "back")
    assert (tagged.status, tagged.attempts) == (Status.TAGGED, 2)
    failed = ask(fleet.url, away, "away")
    assert (failed.status, failed.attempts) == (Status.FAILED, 3)
    assert failed.error is not None
    assert (failed.error.code.value, failed.error.retryable) == ("source_unavailable", True)
    [(job_id, record)] = client.hgetall(DEAD_MESSAGES).items()
    assert job_id == b"away"
    assert read_message(record.partition(b"|")[2]).fields["image"] == away
    assert client.hlen(ATTEMPTS) == client.hlen(CLAIMS) == client.zcard(DELAYED) == 0
    assert near.log_text().count(LATER) == said + 3, "one for the first, two for the second"


def test_a_pause_that_a_source_asks_for_is_kept(fleet: Fleet, near: WorkerProcess, http_server: PictureServer) -> None:
    """The job comes back after it, not before, and the worker does not ask in between."""
    good = Reply.picture(pictures.jpeg(pictures.picture()))
    busy = http_server.serve("/busy.jpg", Reply(status=429, headers={"Retry-After": "3"}), good)
    began_s = time.monotonic()
    tagged = ask(fleet.url, busy, "busy")
    assert (tagged.status, tagged.attempts) == (Status.TAGGED, 2)
    assert time.monotonic() - began_s > 3.0
    assert http_server.hits == {"/busy.jpg": 2}


def test_a_reply_that_the_worker_does_not_know_is_its_own_fault(
    fleet: Fleet, near: WorkerProcess, http_server: PictureServer
) -> None:
    """Retried, then failed, logged as an error, kept as a dead letter; not a fact about the image."""
    failed = ask(fleet.url, http_server.serve("/teapot.jpg", Reply.error(418)), "teapot")
    assert (failed.status, failed.attempts) == (Status.FAILED, 3)
    assert failed.error is not None
    assert (failed.error.code, failed.error.retryable) == ("source_error", True)
    assert http_server.hits == {"/teapot.jpg": 3}, "no quick tries"
    [line] = [text for text in near.log_text().splitlines() if "source_failed" in text and "teapot" in text][:1]
    assert '"level": "error"' in line
    assert "HTTP 418" in line
    assert fleet.client.hexists(DEAD_MESSAGES, "teapot")
