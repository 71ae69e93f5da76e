"""A fork server that hangs or ends: the loaders that run go on, and others are started as soon as it is possible."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shiwu_worker.loaders import starter
from shiwu_worker.runtime.proc import stat_fields
from tests.support import pictures
from tests.support.family import children, lives
from tests.support.loader_pool import Pool
from tests.support.waiting import wait_until

IMAGES = 8


@pytest.fixture
def good(tmp_path: Path) -> str:
    """An image in the allowed folder."""
    path = tmp_path / "good.png"
    path.write_bytes(pictures.png(pictures.picture().resize((80, 80))))
    return path.as_uri()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """Three loaders at work."""
    with Pool(tmp_path, processes=3) as made:
        yield made


def fork_server_of(loader: int) -> int:
    """The parent of a loader."""
    return int(stat_fields(f"/proc/{loader}/stat")[1])


def test_hanging_fork_server_does_not_delay_running_loaders(pool: Pool, good: str) -> None:
    """While it is stopped, a loader ends: the other two answer, also what that one held. Then it goes on."""
    victim = pool.pool.pids[0]
    fork_server = fork_server_of(victim)
    os.kill(fork_server, signal.SIGSTOP)
    try:
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(pool.pool.pids) == 2, timeout_s=20)
        pool.submit(*[good] * IMAGES)
        pool.wait(IMAGES)
        assert len(pool.pool.pids) == 2, "the fork server has forked nothing"
    finally:
        os.kill(fork_server, signal.SIGCONT)
    wait_until(lambda: len(pool.pool.pids) == 3, timeout_s=20)
    assert [seen.error for seen in pool.results.values()] == [None] * IMAGES
    assert not pool.fatal


def test_fork_server_that_hangs_on_is_replaced(pool: Pool, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loaders go on, and it ends after them."""
    monkeypatch.setattr(starter, "FORK_TIMEOUT_S", 0.5)
    victim, *others = pool.pool.pids
    fork_server = fork_server_of(victim)
    os.kill(fork_server, signal.SIGSTOP)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(pool.pool.pids) == 3 and victim not in pool.pool.pids, timeout_s=60)
    assert set(others) < set(pool.pool.pids)
    assert lives(fork_server)
    for loader in others:
        os.kill(loader, signal.SIGKILL)
    wait_until(lambda: not lives(fork_server), timeout_s=20)
    pool.submit(*[good] * IMAGES)
    pool.wait(IMAGES)
    assert [seen.error for seen in pool.results.values()] == [None] * IMAGES
    assert not pool.fatal


def test_fork_server_that_ends_is_replaced_with_its_loaders(pool: Pool, good: str) -> None:
    """The loaders end with it, and their images are answered by others."""
    before = pool.pool.pids
    os.kill(fork_server_of(before[0]), signal.SIGKILL)
    pool.submit(*[good] * IMAGES)
    pool.wait(IMAGES)
    wait_until(lambda: len(pool.pool.pids) == 3 and not set(before) & set(pool.pool.pids), timeout_s=60)
    assert [seen.error for seen in pool.results.values()] == [None] * IMAGES
    assert not pool.fatal


def test_closed_pool_leaves_no_fork_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the one in use nor one that hangs."""
    monkeypatch.setattr(starter, "FORK_TIMEOUT_S", 0.5)
    before = set(children(os.getpid()))
    with Pool(tmp_path, processes=2) as made:
        hanging = fork_server_of(made.pool.pids[0])
        os.kill(hanging, signal.SIGSTOP)
        os.kill(made.pool.pids[0], signal.SIGKILL)
        wait_until(lambda: len(set(children(os.getpid())) - before) == 2, timeout_s=60)
    assert set(children(os.getpid())) - before == set()
