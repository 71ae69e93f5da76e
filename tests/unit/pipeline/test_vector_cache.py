"""The vectors that a worker keeps: which of them stay, and that they are what the model gave."""

from __future__ import annotations

import numpy as np
import pytest

from shiwu.contract import ImageInfo
from shiwu_worker.pipeline.vector_cache import MAX_REFERENCE_CHARS, VectorCache


def image(reference: str = "s3://b/k") -> ImageInfo:
    """The facts of an image."""
    return ImageInfo(reference=reference, format="PNG", width=3, height=2, bytes=7)


def vector(number: int) -> list[float]:
    """A vector that no other number has."""
    return [number, 1 / (number + 1)]


def put(cache: VectorCache, *numbers: int, batch_size: int = 1) -> None:
    """Keep the vectors of these images, whose names are numbers."""
    for begin in range(0, len(numbers), batch_size):
        batch = numbers[begin : begin + batch_size]
        cache.put([str(each) for each in batch], [image()] * len(batch), np.array(list(map(vector, batch)), np.float32))


def test_vectors_come_back_as_they_were_given() -> None:
    """Bit by bit, in float32; a later change of a copy changes nothing."""
    cache = VectorCache(4)
    given = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    cache.put(["a", "b", "c"], [image(), None, image()], given)
    for row, key in enumerate("abc"):
        found, facts = cache.get(key)
        assert (found == given[row]).all()
        assert facts == (None if key == "b" else image())
        found[:] = 0
        assert (cache.get(key)[0] == given[row]).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_oldest_vectors_are_dropped(batch_size: int) -> None:
    """Whatever the size of batches, also of those larger than the cache; a dropped one is not found."""
    cache = VectorCache(4)
    put(cache, *range(9), batch_size=batch_size)
    assert len(cache) == 4
    assert sorted(cache.rows) == ["5", "6", "7", "8"]
    assert sorted(cache.take_dropped()) == ["0", "1", "2", "3", "4"]
    assert cache.take_dropped() == []
    for number in range(5, 9):
        assert cache.get(str(number))[0].tolist() == np.array(vector(number), np.float32).tolist()
    with pytest.raises(KeyError):
        cache.get("0")


def test_vector_in_use_stays() -> None:
    """Ten times as many images as the cache holds pass by; those in use take no more than their places."""
    cache = VectorCache(10)
    put(cache, 0, 1, 2)
    for number in range(3, 100, 3):
        put(cache, number, number + 1, number + 2, batch_size=2)
        for kept in range(3):
            assert cache.get(str(kept))[0].tolist() == np.array(vector(kept), np.float32).tolist()
    assert len(cache) == 10
    assert len(set(cache.take_dropped())) == 102 - 10


def test_vector_that_is_used_no_more_is_dropped() -> None:
    """It stays for one more round of the ring; where all are in use, the oldest goes."""
    cache = VectorCache(3)
    put(cache, 0, 1, 2)
    for number in range(3):
        cache.get(str(number))
    put(cache, 3)
    assert sorted(cache.rows) == ["1", "2", "3"]
    put(cache, 4, 5)
    assert sorted(cache.rows) == ["3", "4", "5"]


def test_long_reference_is_not_kept() -> None:
    """The reference of the first job with an image is of no use for others, and may be long."""
    cache = VectorCache(2)
    references = ["k" * MAX_REFERENCE_CHARS, "k" * (MAX_REFERENCE_CHARS + 1)]
    cache.put(["a", "b"], [image(reference) for reference in references], np.zeros((2, 1), np.float32))
    assert [cache.get(key)[1] for key in "ab"] == [image(references[0]), image("")]


def test_cleared_cache_is_empty() -> None:
    """No vector is found afterwards."""
    cache = VectorCache(2)
    put(cache, 1)
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(KeyError):
        cache.get("1")
