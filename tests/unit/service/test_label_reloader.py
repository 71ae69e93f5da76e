"""What tells a changed folder of label sets, and what the log says of a change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.service import label_reloader as module
from shiwu_worker.service.label_reloader import LabelReloader, changed_sets, folder_stamp
from tests.support.rule_sets import read_set
from tests.support.waiting import wait_until


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


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), ValueError("wrong"), KeyError("a defect")])
def test_reload_that_fails_is_not_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever the error is: the next change, or the next SIGHUP, has the files read again."""
    monkeypatch.setattr(module, "TICK_S", 0.01)
    ends: list[bool] = []
    reads: list[Exception] = [error]

    def read() -> Mapping[str, LabelSet]:
        if reads:
            raise reads.pop()
        return {"a": LabelSet("a", ("x",))}

    bank: Any = SimpleNamespace(sets={}, check=lambda _: None, default_of=lambda _: None, known=lambda _: None)
    bank.install = lambda sets, _: setattr(bank, "sets", sets)
    reloader = LabelReloader(
        bank,
        folder=tmp_path,
        poll_s=0.0,
        read=read,
        encode_ahead=lambda label_set, on_end: on_end(SimpleNamespace(label_set=label_set)),  # type: ignore[arg-type]  # what is used of it
        check_default=lambda _: None,
        on_end=ends.append,
    )
    reloader.thread.start()
    with capture_logs() as logs:
        reloader.ask()
        wait_until(lambda: ends == [False], timeout_s=10, what="the first reload ends")
        reloader.ask()
        wait_until(lambda: ends == [False, True], timeout_s=10, what="the second reload ends")
    assert reloader.thread.close(10.0)
    assert [line["event"] for line in logs] == ["label_sets_not_reloaded", "label_sets_reloaded"]
    assert set(bank.sets) == {"a"}
