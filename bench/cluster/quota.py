"""Holds processes to a share of one core, by a control group of the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from os import getpid
from pathlib import Path
from typing import Final

from tests.support.waiting import wait_until

PERIOD_US: Final = 20_000
"""A process that has used its share waits for the next period, which with the kernel's default of 100 ms is long."""
V1: Final = Path("/sys/fs/cgroup/cpu")
V2: Final = Path("/sys/fs/cgroup")
_NUMBERS: Final = count()


class NoQuota(Exception):
    """This process cannot limit the CPU time of others."""


class Quota:
    """A control group. Its limit may be changed at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, pid: int) -> None:
        """Put a process with all of its threads into the group."""
        (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def limit(self, share: float | None) -> None:
        """Allow the processes of the group together this share of one core; None: no limit."""
        quota_us = None if share is None else max(1000, int(share * PERIOD_US))
        # The kernel's smallest quota is 1 ms, so a small share needs a longer period.
        period_us = PERIOD_US if share is None else max(PERIOD_US, int((quota_us or 0) / share))
        if (self._folder / "cpu.max").exists():
            text = "max" if quota_us is None else str(quota_us)
            (self._folder / "cpu.max").write_text(f"{text} {period_us}", encoding="ascii")
            return
        (self._folder / "cpu.cfs_period_us").write_text(str(period_us), encoding="ascii")
        (self._folder / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us), encoding="ascii")


@contextmanager
def open_quota() -> Iterator[Quota]:
    """Make a group, and delete it once its processes have ended.

    Raises:
        NoQuota: the control groups of this machine cannot be written.
    """
    root = V1 if (V1 / "cpu.cfs_quota_us").exists() else V2
    folder = root / f"shiwu-bench-{getpid()}-{next(_NUMBERS)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoQuota(_text(root, error)) from None
    quota = Quota(folder)
    try:
        try:
            quota.limit(None)
        except OSError as error:
            raise NoQuota(_text(root, error)) from None
        yield quota
    finally:
        with suppress(OSError, TimeoutError):
            wait_until(lambda: not (folder / "cgroup.procs").read_text(encoding="ascii").strip(), timeout_s=10)
            folder.rmdir()


def _text(root: Path, error: OSError) -> str:
    return (
        f"expected control groups with a quota for CPU time under {root}, got {type(error).__name__}: "
        f"{error.strerror}; run as root, outside a container or in one with writable control groups"
    )
