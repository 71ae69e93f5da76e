"""What tells a changed folder of label sets, and what the log says of a change."""

from __future__ import annotations

import os
from pathlib import Path

from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.service.label_reloader import changed_sets, folder_stamp
from tests.support.rule_sets import read_set


def test_stamp_changes_with_files_and_with_swapped_links(tmp_path: Path) -> None:
    """Also where a file is replaced by one of the same size and time; other files do not count."""
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "a.yaml").write_text("name: a")
        os.utime(tmp_path / f"..{number}" / "a.yaml", (1, 1))
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "..data").symlink_to("../..1")
    (folder / "a.yaml").symlink_to("..data/a.yaml")
    first = folder_stamp(folder)
    (folder / "notes.txt").write_text("x")
    assert folder_stamp(folder) == first
    (folder / "..new").symlink_to("../..2")
    os.replace(folder / "..new", folder / "..data")
    second = folder_stamp(folder)
    assert second != first
    (folder / "b.json").write_text("{}")
    assert folder_stamp(folder) != second
    (folder / "gone.yaml").symlink_to("nowhere")
    assert isinstance(folder_stamp(folder), str)


def test_change_names_labels_and_digests(tmp_path: Path) -> None:
    """Sets that are added and removed have one digest; an alias changes a label and no digest."""
    old = read_set(tmp_path, labels=["a", "b", {"label": "c", "texts": ["c", "d"]}])
    new = read_set(tmp_path, labels=["a", {"label": "c", "texts": ["c"]}, "e"])
    alias = read_set(tmp_path, labels=["a", "b", {"label": "c", "texts": ["c", "d"], "aliases": ["x"]}])
    assert changed_sets({"mine": old}, {"mine": old}) == {}
    assert changed_sets({"mine": old}, {"mine": new})["mine"] == {
        "old_digest": old.info.digest,
        "new_digest": new.info.digest,
        "added": ["e"],
        "removed": ["b"],
        "changed": ["c"],
    }
    found = changed_sets({"mine": old}, {"mine": alias})["mine"]
    assert (found["changed"], found["old_digest"]) == (["c"], found["new_digest"])
    assert changed_sets({"x": LabelSet("x", ("a",))}, {})["x"]["new_digest"] is None
