"""demo/photos: every photograph is listed, has an author and a licence, and can be opened."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from recipes.packages import read_packages

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "demo" / "photos"
SAMPLES: list[dict[str, Any]] = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))
GOOD = [sample for sample in SAMPLES if sample["error"] is None]
FREE = ("CC0-1.0", "CC-BY-", "CC-BY-SA-", "public domain")
MAX_FOLDER_BYTES = 3 * 1024**2
MAX_SIDE = 1024


def test_every_file_is_listed_and_every_listed_file_is_there() -> None:
    """Except the one that is missing on purpose."""
    files = {path.name for path in FOLDER.iterdir()} - {"samples.json"}
    listed = [sample["file"] for sample in SAMPLES]
    assert len(listed) == len(set(listed))
    assert files == {sample["file"] for sample in SAMPLES if sample["error"] != "source_not_found"}


def test_samples_are_many_and_small() -> None:
    """At least 30, in all of the forms that the demo shows, in 3 MB."""
    forms = {sample["form"] for sample in SAMPLES}
    assert len(GOOD) >= 30
    assert {"JPEG", "PNG", "WebP", "AVIF", "GIF", "12 MP", "EXIF-turned", "CMYK", "cut off", "missing"} <= forms
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_FOLDER_BYTES


@pytest.mark.parametrize("sample", GOOD, ids=lambda sample: sample["file"])
def test_a_sample_opens_and_names_its_origin(sample: dict[str, Any]) -> None:
    """Author, free licence, package with sha256, changes, and a word that is right."""
    assert sample["author"]
    assert sample["licence"].startswith(FREE)
    assert sample["package"] in read_packages()
    assert sample["path"]
    assert sample["changes"]
    assert sample["expected"]
    with Image.open(FOLDER / sample["file"]) as image:
        image.load()
        limit = 5000 if sample["form"] == "12 MP" else MAX_SIDE
        assert max(image.size) <= limit
        assert (image.mode == "CMYK") == (sample["form"] == "CMYK")


def test_the_broken_sample_cannot_be_decoded() -> None:
    """It has a picture's head, and not all of its pixels."""
    (broken,) = [sample for sample in SAMPLES if sample["error"] == "picture_broken"]
    with Image.open(FOLDER / broken["file"]) as image, pytest.raises(OSError, match="truncated"):
        image.load()


def test_notice_names_every_author() -> None:
    """And the licence of each photograph."""
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for sample in GOOD:
        assert any(
            sample["file"] in line and sample["author"] in line and sample["licence"] in line
            for line in notice.splitlines()
        ), sample["file"]


def test_expected_words_are_in_a_shipped_label_set() -> None:
    """At least one of each photograph in everyday-zh, the set that the demo uses."""
    folder = ROOT / "worker/shiwu_worker/data/label_sets"
    everyday = yaml.safe_load((folder / "everyday-zh.yaml").read_text(encoding="utf-8"))["labels"]
    assert [sample["file"] for sample in GOOD if not set(sample["expected"]) & set(everyday)] == []


def test_recipes_are_checked_as_the_other_code_is() -> None:
    """Types by mypy, form by ruff; recipes are no part of the wheel."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-p recipes" in makefile
    assert " recipes\n" in makefile.split("CODE := ")[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "recipes" not in str(project["tool"]["hatch"])
