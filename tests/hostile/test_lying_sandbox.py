"""A sandbox that an image has taken over: whatever it sends, no image gets the pixels or the facts of another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image

from shiwu.contract import ErrorCode
from tests.support import lying_sandbox, pictures
from tests.support.loader_pool import SLOTS, Pool
from tests.support.lying_sandbox.sitecustomize import MARK, lies

LIES = (*lies(1),)
GOOD = tuple(pictures.png(Image.new("RGB", (40 + n, 30), (10 * n, 50, 200 - 9 * n))) for n in range(8))


@pytest.fixture(autouse=True)
def sandbox_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers of this test start with the lying sandbox."""
    [folder] = lying_sandbox.__path__
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))


def image_file(folder: Path, data: bytes, lie: str | None = None) -> str:
    """An image about which the sandbox lies, or does not."""
    path = folder / f"{hashlib.sha256(data).hexdigest()[:8]}-{(lie or 'truth').replace(' ', '-')}.png"
    path.write_bytes(data + (MARK + lie.encode() if lie is not None else b""))
    return path.as_uri()


def check_good(made: Pool, tickets: range) -> None:
    """Each has its own facts, and the pixels of its own colour."""
    for ticket in tickets:
        data, seen = GOOD[ticket % len(GOOD)], made.results[ticket]
        assert seen.error is None
        assert seen.sha256 == hashlib.sha256(data).hexdigest()
        assert (seen.format, seen.width, seen.height, seen.n_bytes) == ("PNG", 40 + ticket % len(GOOD), 30, len(data))
        assert (made.pool.pixels[ticket % SLOTS] == (10 * (ticket % 8), 50, 200 - 9 * (ticket % 8))).all()


@pytest.mark.parametrize("first", range(0, len(LIES), 12))
def test_every_lie_counts_as_a_crashed_sandbox(tmp_path: Path, first: int) -> None:
    """The image fails alone, and the others, which are in the same sandboxes, are answered with their own pixels."""
    lied_about = LIES[first : first + 12]
    with Pool(tmp_path, processes=1, spares=1) as made:
        made.submit(*(image_file(tmp_path, data) for data in GOOD))
        made.wait(len(GOOD))
        made.submit(*(image_file(tmp_path, GOOD[0], lie) for lie in lied_about), first_ticket=8)
        made.submit(*(image_file(tmp_path, data) for data in GOOD), first_ticket=24)
        made.wait(2 * len(GOOD) + len(lied_about))
        found = {lie: made.results[8 + n] for n, lie in enumerate(lied_about)}
        assert {lie: seen.error.code if seen.error else None for lie, seen in found.items()} == dict.fromkeys(
            lied_about, ErrorCode.DECODER_CRASHED
        )
        assert all(seen.sha256 is None and seen.width is None for seen in found.values())
        check_good(made, range(8))
        check_good(made, range(24, 32))
        assert not made.fatal


def test_second_reply_is_not_taken_for_the_next_image(tmp_path: Path) -> None:
    """A reply without a request ends the sandbox when the next request is sent."""
    with Pool(tmp_path, processes=1, threads=1) as made:
        made.submit(image_file(tmp_path, GOOD[0], "one more reply"), image_file(tmp_path, GOOD[1]))
        made.wait(2)
        check_good(made, range(1, 2))
        assert made.pool.restarts == 1


def test_sandbox_that_never_replies_meets_the_deadline(tmp_path: Path) -> None:
    """It uses no CPU, so the limit of fetch and decode ends it; other images are answered."""
    with Pool(tmp_path, processes=1, spares=1, task_timeout_s=1.5) as made:
        made.submit(image_file(tmp_path, GOOD[0], "silence"), image_file(tmp_path, GOOD[1]))
        made.wait(2)
        error = made.results[0].error
        assert error is not None
        assert error.code is ErrorCode.DECODER_TIMEOUT
        check_good(made, range(1, 2))
