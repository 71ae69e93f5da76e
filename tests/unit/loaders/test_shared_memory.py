"""What loaders and their worker know of images: hints in shared memory, and turns among the threads of one loader."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shiwu_worker.loaders import shared_memory
from shiwu_worker.loaders.shared_memory import DecodeTurns, KnownImages, create_memory, entry_count, map_memory
from tests.support import pictures
from tests.support.loader_options import LOADER_OPTIONS
from tests.support.loader_pool import Pool
from tests.support.waiting import wait_until

ONE, SAME_PLACE, OTHER = "0" * 15 + "1" + "a" * 48, "0" * 15 + "1" + "b" * 48, "0" * 15 + "2" + "c" * 48


def test_noted_images_are_known_until_they_are_forgotten() -> None:
    """A digest with the place of another one takes it over; forgetting the first then leaves the second alone."""
    known = KnownImages(np.zeros(4, np.uint64))
    assert ONE not in known
    known.note(ONE)
    known.note(OTHER)
    assert ONE in known
    assert OTHER in known
    assert SAME_PLACE not in known
    known.note(SAME_PLACE)
    assert ONE not in known
    known.forget([ONE, OTHER])
    assert SAME_PLACE in known
    assert OTHER not in known


def test_without_entries_no_image_is_known() -> None:
    """A worker that shares nothing has no table, and noting has no effect."""
    known = KnownImages(np.zeros(0, np.uint64))
    known.note(ONE)
    known.forget([ONE])
    assert ONE not in known


@pytest.mark.parametrize(("images", "entries"), [(0, 0), (1, 4), (2, 8), (3, 16), (20_000, 131_072)])
def test_table_has_four_entries_or_more_for_each_image(images: int, entries: int) -> None:
    """Rounded up to a power of two."""
    assert entry_count(images) == entries


def test_two_mappings_of_one_memory_share_pixels_and_table() -> None:
    """As a worker and its loader map it; the table does not overlap the pixels."""
    options = LOADER_OPTIONS.model_copy(update={"slots": 3, "known_images": 10})
    memory_fd = create_memory(options)
    try:
        (pixels, known), (other_pixels, other_known) = (map_memory(memory_fd, options) for _ in range(2))
    finally:
        os.close(memory_fd)
    known.note(ONE)
    pixels[:] = 255
    assert ONE in other_known
    assert other_pixels.shape == (3, options.spec.height, options.spec.width, 3)
    assert other_pixels.all()
    known.forget([ONE])
    assert ONE not in other_known
    assert other_pixels.all()


def test_threads_with_equal_files_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, but not longer than the limit; another file waits for neither."""
    turns, entered, may_end = DecodeTurns(), [], threading.Event()

    def decode(digest: str, name: str) -> None:
        with turns.turn(digest):
            entered.append(name)
            assert may_end.wait(30)

    threads = [threading.Thread(target=decode, args=(ONE, "first"), daemon=True)]
    threads[0].start()
    wait_until(lambda: entered == ["first"], timeout_s=10)
    threads += [threading.Thread(target=decode, args=one, daemon=True) for one in ((ONE, "second"), (OTHER, "other"))]
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: "other" in entered, timeout_s=10)
    may_end.set()
    for thread in threads:
        thread.join(20)
    assert sorted(entered) == ["first", "other", "second"]
    assert turns._ends == {}
    may_end.clear()
    monkeypatch.setattr(shared_memory, "TURN_TIMEOUT_S", 0.05)
    late = [threading.Thread(target=decode, args=(ONE, name), daemon=True) for name in ("third", "fourth")]
    for thread in late:
        thread.start()
    wait_until(lambda: {"third", "fourth"} <= set(entered), timeout_s=10, what="the second to go on after the limit")
    may_end.set()


@pytest.mark.parametrize("processes", [1, 2])
def test_equal_files_are_decoded_once_by_each_loader_at_most(tmp_path: Path, processes: int) -> None:
    """Whatever their names. An image that was forgotten, or whose pixels are needed, is decoded again."""
    data = pictures.png(pictures.picture().resize((80, 80)))
    paths = [tmp_path / f"{number}.png" for number in range(16)]
    for path in paths:
        path.write_bytes(data)
    (tmp_path / "other.png").write_bytes(pictures.png(pictures.picture().resize((60, 60))))
    references = [path.as_uri() for path in paths]
    with Pool(tmp_path, processes=processes, known_images=100) as made:
        made.submit(*references, (tmp_path / "other.png").as_uri())
        made.wait(17)
        counts = Counter(result.format for result in made.results.values())
        assert 2 <= counts["PNG"] <= 1 + processes
        assert made.results[16].format == "PNG"
        [digest] = {made.results[number].sha256 for number in range(16)}
        made.submit(references[0], first_ticket=20)
        made.wait(18)
        assert made.results[20].format is None
        made.submit(references[0], first_ticket=21, has_to_be_decoded=True)
        made.wait(19)
        assert made.results[21].format == "PNG"
        assert digest is not None
        made.pool.known_images.forget([digest])
        made.submit(references[0], first_ticket=22)
        made.wait(20)
        assert made.results[22].format == "PNG"


def test_broken_file_is_not_known(tmp_path: Path) -> None:
    """Each job with it gets its own error, because nothing is shared of a failure."""
    data = pictures.png(pictures.picture().resize((80, 80)))[:200]
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path in paths:
        path.write_bytes(data)
    with Pool(tmp_path, processes=1, known_images=100) as made:
        made.submit(*[path.as_uri() for path in paths])
        made.wait(6)
        assert [result.error.code for result in made.results.values() if result.error] == ["picture_broken"] * 6
