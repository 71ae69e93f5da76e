"""Files for probes: created, touched and removed, and never written through a link."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shiwu_worker.health.probe_files import ProbeFiles, is_probe_file

WRITES: list[Callable[[ProbeFiles], None]] = [
    lambda files: files.set_ready(is_ready=True),
    lambda files: files.touch_alive(),
    lambda files: files.touch_alive(at_s=1000.0),
]


def both_at(path: Path) -> ProbeFiles:
    """Both files at one path."""
    return ProbeFiles(ready_file=path, alive_file=path)


def test_probe_files_are_created_touched_and_removed(tmp_path: Path) -> None:
    """Also at a time in the past; existing content stays."""
    path = tmp_path / "probe"
    files = both_at(path)
    files.set_ready(is_ready=True)
    path.write_text("kept")
    files.touch_alive(at_s=1000.0)
    assert path.stat().st_mtime == 1000
    files.touch_alive()
    assert path.stat().st_mtime > 1000
    assert path.read_text() == "kept"
    assert is_probe_file(path)
    files.set_ready(is_ready=False)
    files.set_ready(is_ready=False)
    assert not is_probe_file(path)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("exists", [True, False])
def test_probe_file_that_is_a_link_is_not_followed(tmp_path: Path, write: Callable[..., None], exists: bool) -> None:
    """Neither is a file made at its target, nor the target's time changed."""
    target, link = tmp_path / "target", tmp_path / "link"
    if exists:
        target.touch()
        os.utime(target, (5, 5))
    link.symlink_to(target)
    with capture_logs() as logs:
        write(both_at(link))
    assert "expected a file of this worker, got a link" in logs[0]["error"]
    assert target.exists() is exists
    assert not exists or target.stat().st_mtime == 5
    assert not is_probe_file(link)


def test_removing_a_linked_ready_file_keeps_its_target(tmp_path: Path) -> None:
    """Only the link goes."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    both_at(link).set_ready(is_ready=False)
    assert target.exists()
    assert not link.is_symlink()


@pytest.mark.parametrize("write", WRITES)
def test_probe_file_that_is_a_pipe_does_not_block(tmp_path: Path, write: Callable[..., None]) -> None:
    """Opening a pipe for writing would wait for a reader, and stop the heartbeat."""
    os.mkfifo(tmp_path / "pipe")
    with capture_logs() as logs:
        write(both_at(tmp_path / "pipe"))
    assert [line["event"] for line in logs] == ["probe_file_failed"]


def test_missing_folder_is_logged_once_and_raises_nothing(tmp_path: Path) -> None:
    """The worker touches the file every second; one line says that probes see an old state."""
    files = ProbeFiles(ready_file=None, alive_file=tmp_path / "gone" / "alive")
    with capture_logs() as logs:
        for _ in range(3):
            files.touch_alive()
    assert [line["event"] for line in logs] == ["probe_file_failed"]


def test_ready_file_is_written_once_its_folder_is_back(tmp_path: Path) -> None:
    """Readiness changes seldom, so a write that failed is repeated with the liveness file."""
    folder = tmp_path / "gone"
    files = ProbeFiles(ready_file=folder / "ready", alive_file=None)
    files.set_ready(is_ready=False)
    assert not files.set_ready(is_ready=True)
    folder.mkdir()
    files.touch_alive()
    assert (folder / "ready").exists()


def test_ready_file_that_cannot_be_removed_raises_nothing(tmp_path: Path) -> None:
    """A worker drains whole also where its ready file has become a folder."""
    path = tmp_path / "ready"
    path.mkdir()
    assert not ProbeFiles(ready_file=path, alive_file=None).set_ready(is_ready=False)
    assert path.exists()
