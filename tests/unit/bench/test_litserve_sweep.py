"""The sweep of LitServe's settings finds the best ones of a machine whose rates are known."""

from __future__ import annotations

import pytest
from bench.litserve_sweep import candidates, neighbours, processes, sweep
from bench.picture_systems import LitServeSettings, litserve_settings


def rate_of(settings: LitServeSettings) -> float:
    """A machine with one best place: two processes of one thread, batches of 32, 2 ms."""
    size = {16: 0.8, 32: 1.0, 64: 0.9}.get(settings.max_batch, 0.5)
    timeout = {0.001: 0.9, 0.002: 1.0}.get(settings.batch_timeout_s, 0.8)
    return 100 * size * timeout * (1.0 if settings.workers == 2 else 0.7)


def test_sweep_finds_the_best_settings_and_measures_each_once() -> None:
    """One kind of setting after another, until nothing gets better."""
    measured: list[LitServeSettings] = []

    def measure(settings: LitServeSettings) -> float:
        measured.append(settings)
        return rate_of(settings)

    first = litserve_settings(is_gpu=False, max_batch=16)
    tried = sweep(first, measure, cores=2, is_gpu=False)
    best = tried[0].settings
    assert (best.workers, best.threads, best.max_batch, best.batch_timeout_s) == (2, 1, 32, 0.002)
    assert best.concurrency == 96
    assert len(measured) == len(set(measured)) == len(tried)
    assert first in measured
    assert [each.per_second for each in tried[1:]] == sorted((each.per_second for each in tried[1:]), reverse=True)


def test_small_gain_changes_nothing() -> None:
    """Turns differ by chance, so the settings at hand stay."""
    first = litserve_settings(is_gpu=False)
    tried = sweep(first, lambda settings: 100.0 if settings == first else 101.0, cores=2, is_gpu=False)
    assert tried[0].settings == first


@pytest.mark.parametrize(
    ("cores", "is_gpu", "found"),
    [
        (1, False, [(1, 1)]),
        (2, False, [(1, 2), (2, 1)]),
        (4, False, [(1, 4), (2, 2), (4, 1)]),
        (2, True, [(1, 2), (2, 1)]),
        (8, True, [(1, 8), (2, 4), (3, 2), (4, 2)]),
    ],
)
def test_processes_share_the_cores(cores: int, found: list[tuple[int, int]], *, is_gpu: bool) -> None:
    """On a CPU without a rest; a GPU is worth more than one process."""
    assert processes(cores, is_gpu=is_gpu) == found


def test_neighbours_end_at_the_ends() -> None:
    """One to each side."""
    assert neighbours((1, 2, 4), 2) == [1, 4]
    assert neighbours((1, 2, 4), 1) == [2]
    assert neighbours((1, 2, 4), 4) == [2]
    assert len(list(candidates(litserve_settings(is_gpu=True), cores=8, is_gpu=True))) == 3
