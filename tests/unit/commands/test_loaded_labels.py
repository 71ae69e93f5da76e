"""What the commands for label sets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu_worker.commands.loaded_labels import write_file
from shiwu_worker.errors import ExitCode, FatalError


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """It replaces an older one, all users may read it, and nothing stays of a file that could not be written."""
    output = tmp_path / "labels.yaml"
    for text in ("name: a", "name: 猫"):
        write_file(output, text)
        assert (output.read_text(encoding="utf-8"), output.stat().st_mode & 0o777) == (text, 0o644)
    (tmp_path / "folder").mkdir()
    for wrong in (tmp_path / "folder", tmp_path / "none" / "x.yaml"):
        with pytest.raises(FatalError, match="cannot be written") as caught:
            write_file(wrong, "name: a")
        assert caught.value.exit_code is ExitCode.CONFIG
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "y.yaml", "\ud800")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "labels.yaml"]
