"""The demo works as README.md describes it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import pictures
from tests.support.processes import ROOT, Process, clean_environment


@pytest.fixture
def demo(tmp_path: Path) -> Process:
    """`python -m demo`, not started."""
    return Process(
        [sys.executable, "-m", "demo", "--page", str(tmp_path / "page.html")],
        name="demo",
        folder=tmp_path,
        env=clean_environment({}),
    )


def test_the_demo_tags_every_good_picture_and_names_every_error(demo: Process) -> None:
    """Exit code 0, nothing unexpected, and the embedded model finds the right word for most photographs."""
    with demo:
        assert demo.wait(timeout_s=150) == 0, demo.log_tail(lines=80)
    text = demo.log_text()
    assert "34 tagged, 5 failed as expected, 0 not as expected" in text
    found = re.search(r"came\s+first\s+for\s+(\d+)\s+of\s+34\s+and\s+among\s+the\s+first\s+five\s+for\s+(\d+)", text)
    assert found, text
    assert int(found[1]) >= 22
    assert int(found[2]) >= 30
    page = re.search(r"page with the images: (/\S+\.html)", text)
    assert page, text
    assert Path(page[1]).read_text(encoding="utf-8").count('"webp"') == 34
    for code in ("picture_broken", "source_not_found", "not_a_picture", "source_forbidden"):
        assert code in text


def test_the_demo_tags_a_folder_of_ones_own(tmp_path: Path) -> None:
    """Images in sub-folders too; an image that fails is told, and is no failure of the demo."""
    (tmp_path / "mine" / "more").mkdir(parents=True)
    (tmp_path / "mine" / "panda.jpg").write_bytes(pictures.jpeg(pictures.picture("熊猫")))
    (tmp_path / "mine" / "more" / "[red]broken.PNG").write_bytes(b"no image")
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    command = [sys.executable, "-m", "demo", str(tmp_path / "mine"), "--page", str(tmp_path / "page.html")]
    with Process(command, name="demo", folder=tmp_path, env=clean_environment({})) as demo:
        assert demo.wait(timeout_s=150) == 0, demo.log_tail(lines=80)
    text = demo.log_text()
    assert "1 tagged, 1 failed, 0 not as expected; 2 pictures" in text
    assert re.search(r"panda\.jpg\s+JPG\s+file\s+\S+:\d+", text)
    assert "not_a_picture" in text
    assert re.search(r"\[red\]broken", text)
    found = re.search(r"page with the images: (/\S+\.html)", text)
    assert found, text
    assert "panda.jpg" in Path(found[1]).read_text(encoding="utf-8")


def test_the_demo_without_images_says_so(tmp_path: Path) -> None:
    """Before it starts anything."""
    command = [sys.executable, "-m", "demo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert f"expected images in {tmp_path}" in done.stderr
