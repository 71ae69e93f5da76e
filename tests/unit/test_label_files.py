"""Files of label sets: each fault is told with the name of the file and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu_worker.label_files import load_label_sets


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("name: a\nlabels: []", "labels"),
        ("name: a\nlabels: [x, x]", "once"),
        ('name: a\nlabels: ["x\\ny"]', "U+000A"),
        ('name: a\nlabels: ["x\\u202ey"]', "U+202E"),
        ('name: a\nlabels: [x]\ntemplates: ["{}\\n"]', "U+000A"),
        ("name: a\nlabels: [x]\ntemplates: ['no place']", "exactly one"),
        ("name: a\nlabels: [x]\nlabel: y", "label"),
        ("labels: [x]", "name"),
        ("name: a\nlabels: [x]\nhead: relu", "head"),
        ("[", "YAML"),
        ("", "file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    """The error says which file, and what in it."""
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        load_label_sets([tmp_path])
    assert wrong in str(caught.value)
