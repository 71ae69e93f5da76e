"""The demo works as README.md describes it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from demo import own_images
from demo.album import Entry
from demo.gallery import write_page
from demo.own_images import find_images
from demo.report import Result, show_summary, show_table
from rich.console import Console

from shiwu.contract import Answer, ErrorCode, ErrorInfo, Stage, Status
from tests.support import pictures
from tests.support.gallery_pages import tagged
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
    pictures.picture("熊猫").save(tmp_path / "mine" / "大 熊猫.bmp")
    (tmp_path / "mine" / "more" / "[red]broken.PNG").write_bytes(b"no image")
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    command = [sys.executable, "-m", "demo", str(tmp_path / "mine"), "--page", str(tmp_path / "page.html")]
    with Process(command, name="demo", folder=tmp_path, env=clean_environment({})) as demo:
        assert demo.wait(timeout_s=150) == 0, demo.log_tail(lines=80)
    text = demo.log_text()
    assert "2 tagged, 1 failed, 0 not as expected; 3 images" in text
    assert re.search(r"panda\.jpg\s+JPG\s+file\s+\S+:\d+", text)
    assert "3 images lie ready; left out: other files (1)" in text
    assert "not_a_picture" in text
    assert re.search(r"\[red\]broken", text)
    found = re.search(r"page with the images: (/\S+\.html)", text)
    assert found, text
    page = Path(found[1]).read_text(encoding="utf-8")
    assert "panda.jpg" in page
    assert "大 熊猫.bmp" in page
    assert page.count('"webp"') == 2


def test_own_images_are_found_in_folders_and_by_name(tmp_path: Path) -> None:
    """Below the folders, in any case and alphabet; a file that is named itself needs no suffix, and a link counts."""
    folder, elsewhere = tmp_path / "我的 照片", tmp_path / "elsewhere"
    for file in ("a.JPG", "2024 夏天/b.heic", "notes.txt", ".hidden/c.png", "._a.jpg"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    elsewhere.mkdir()
    (elsewhere / "d.png").touch()
    (elsewhere / "scan").touch()
    (folder / "link.png").symlink_to(elsewhere / "d.png")
    found = find_images([folder, elsewhere / "scan"])
    assert [entry.name for entry in found.entries] == ["b.heic", "a.JPG", "d.png", "scan"]
    assert [entry.form for entry in found.entries] == ["HEIC", "JPG", "PNG", "–"]
    assert found.entries[0].reference.endswith("/2024%20%E5%A4%8F%E5%A4%A9/b.heic")
    assert found.folders == (folder, elsewhere)
    assert found.left_out == "; left out: other files (1)"
    assert find_images([]).left_out == ""


def test_own_images_beyond_the_limit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo says how many it leaves out."""
    monkeypatch.setattr(own_images, "MAX_IMAGES", 2)
    for number in range(5):
        (tmp_path / f"{number}.png").touch()
    found = find_images([tmp_path])
    assert len(found.entries) == 2
    assert found.left_out == "; left out: images beyond the first 2 (3)"


def test_long_file_names_leave_room_for_tags() -> None:
    """The name is cut, and the tags of the row stay on one line."""
    entry = Entry("file:///a.jpg", "JPG", name="很长的名字" * 20 + ".jpg", is_own=True)
    console = Console(width=120, file=io.StringIO())
    show_table(console, [Result(entry, tagged("a", tags={"大熊猫": 0.9123, "熊": 0.02, "未知": 0.01}))])
    assert isinstance(console.file, io.StringIO)
    assert "大熊猫:91 熊:2 未知:1" in console.file.getvalue()


def test_folder_with_a_comma_is_refused(tmp_path: Path) -> None:
    """SHIWU_ALLOW_FOLDERS is a list with commas."""
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "a.png").touch()
    with pytest.raises(ValueError, match="no comma"):
        find_images([tmp_path / "a,b"])


def test_the_demo_without_images_says_so(tmp_path: Path) -> None:
    """Before it starts anything."""
    command = [sys.executable, "-m", "demo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert f"expected images in {tmp_path}, got no file whose name ends with .apng, " in " ".join(done.stderr.split())
    done = subprocess.run([*command, "none/"], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert (done.returncode, "expected folders or files that exist, got none" in done.stderr) == (2, True)


def test_summary_of_one_image_without_tags_is_readable() -> None:
    """One image is no images, there is no model to name, and a slow worker is not at 0 images/s."""
    out = io.StringIO()
    error = ErrorInfo(code=ErrorCode.UNKNOWN_LABEL_SET, message="m", stage=Stage.CLAIM)
    answer = Answer(id="k", status=Status.REJECTED, error=error)
    result = Result(Entry("file:///a.png", "PNG", name="a.png", is_own=True), answer)
    show_summary(Console(file=out, width=200), [result], took_s=10.0)
    assert "; 1 image in 10.00 s, 0.1 images/s (one worker)." in out.getvalue()


def test_page_that_cannot_be_written_is_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo then ends with exit code 1."""
    (tmp_path / "file").touch()
    assert write_page([tagged("k")], tmp_path / "file" / "x" / "page.html", settings={}) is None
    assert "output_failed: --output: expected a file that can be written" in capfd.readouterr().err
