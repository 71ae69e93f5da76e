"""What the wheel holds: the files of both packages, in at most 20 MB, with the licences of what they contain."""

from __future__ import annotations

import tomllib
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    ROOT / path
    for path in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]["packages"]
]
FILES = [
    path
    for package in PACKAGES
    for path in package.rglob("*")
    if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
]
MAX_BYTES = 20_000_000
"""Compressed, as in the wheel."""


def test_wheel_has_20_mb_at_most() -> None:
    """The producer's side installs the same wheel, so the embedded model must stay small."""
    assert [package.name for package in PACKAGES] == ["shiwu", "shiwu_worker"]
    assert sum(len(zlib.compress(path.read_bytes())) for path in FILES) <= MAX_BYTES


def test_wheel_has_one_model_and_its_card() -> None:
    """The tests' model stays outside, and so do training data and photographs but one."""
    weights = [path for path in FILES if path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".onnx"}]
    assert [path.parent.name for path in weights] == ["photo_zh"]
    assert (weights[0].parent / "MODEL_CARD.md").is_file()
    images = [path.name for path in FILES if path.suffix in {".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"}]
    assert images == ["sample.jpg"]


def test_notice_names_what_the_wheel_contains() -> None:
    """LICENSE and NOTICE go into the wheel by the name of their files."""
    assert (ROOT / "LICENSE").is_file()
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for part in ("worker/shiwu_worker/data/photo_zh", "worker/shiwu_worker/data/sample.jpg", "EfficientNet-lite0"):
        assert part in notice


def test_sample_in_the_wheel_is_the_named_photograph() -> None:
    """NOTICE says that it is a copy, with that photograph's licence."""
    copy = ROOT / "worker/shiwu_worker/data/sample.jpg"
    assert copy.read_bytes() == (ROOT / "demo/photos/cat.jpg").read_bytes()
