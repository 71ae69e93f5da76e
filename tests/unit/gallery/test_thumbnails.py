"""Thumbnails from another process: real ones, and commands that fail, hang or write something else."""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shiwu.gallery.thumbnails import MAX_REPLY_BYTES, NOT_INSTALLED, make_thumbnails
from tests.support import pictures


def command(script: str) -> list[str]:
    """A command that runs this script."""
    return [sys.executable, "-c", f"import json, sys, time\n{script}"]


def opened(webp: str | None) -> Image.Image:
    """The image of a thumbnail."""
    assert webp is not None
    return Image.open(io.BytesIO(base64.b64decode(webp)))


def test_the_sandbox_makes_thumbnails_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WebP of at most 160 pixels; what fails has its code; what the operator does not allow is forbidden."""
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "wide.png").write_bytes(pictures.png(Image.new("RGB", (900, 300), (200, 40, 40))))
    (allowed / "small.png").write_bytes(pictures.png(Image.new("RGB", (40, 30))))
    (allowed / "turned.jpg").write_bytes(pictures.turned_jpeg(Image.new("RGB", (300, 200))))
    (allowed / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    monkeypatch.setenv("SHIWU_ALLOW_FOLDERS", str(allowed))
    names = ["wide.png", "small.png", "turned.jpg", "broken.jpg", "none.jpg"]
    references = [(allowed / name).as_uri() for name in names] + [(other / "wide.png").as_uri(), "nonsense"]
    counted: list[int] = []
    made = make_thumbnails(references, timeout_s=60, on_progress=counted.append)
    assert made.problem is None
    found = [made.by_reference[reference] for reference in references]
    wide = opened(found[0].webp)
    assert (wide.format, wide.size) == ("WEBP", (160, 53))
    red, green, _ = wide.convert("RGB").getpixel((80, 26))  # type: ignore[misc]  # RGB has three bands
    assert red > 2 * green
    assert [opened(one.webp).size for one in found[1:3]] == [(40, 30), (160, 107)]
    assert [one.code for one in found[3:]] == [
        "picture_broken",
        "source_not_found",
        "source_forbidden",
        "invalid_reference",
    ]
    assert found[0].sha256
    assert len(found[0].sha256) == 64
    assert counted == list(range(1, 8))


def test_copies_of_an_image_have_thumbnails_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the worker's settings let loaders recognise an image: no vector takes the place of these pixels."""
    image = pictures.png(Image.new("RGB", (90, 30), (200, 40, 40)))
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path in paths:
        path.write_bytes(image)
    monkeypatch.setenv("SHIWU_ALLOW_FOLDERS", str(tmp_path))
    monkeypatch.setenv("SHIWU_VECTOR_CACHE", "100")
    made = make_thumbnails([path.as_uri() for path in paths], timeout_s=60)
    assert made.problem is None
    assert [opened(made.by_reference[path.as_uri()].webp).size for path in paths] == [(90, 30)] * 40


def test_wrong_settings_are_told() -> None:
    """The reason is the last line that the command wrote."""
    made = make_thumbnails(["s3://a/b"], timeout_s=60, command=command("sys.exit('SHIWU_X: expected a number')"))
    assert made.problem == "SHIWU_X: expected a number"


def test_missing_libraries_are_told() -> None:
    """Where only the producer's side is installed."""
    made = make_thumbnails(["s3://a/b"], timeout_s=60, command=command("import no_such_module"))
    assert made.problem == NOT_INSTALLED


def test_command_without_an_end_is_stopped() -> None:
    """What it made until then is kept."""
    script = "print(json.dumps({'number': 1, 'code': 'x'}), flush=True); time.sleep(60)"
    began_s = time.monotonic()
    made = make_thumbnails(["s3://a/b", "s3://a/c"], timeout_s=2, command=command(script))
    assert time.monotonic() - began_s < 20
    assert made.by_reference["s3://a/c"].code == "x"
    assert made.problem == "thumbnails took longer than 2 s"


@pytest.mark.parametrize(
    "reply",
    [
        "'nonsense'",
        "json.dumps({'number': 5, 'code': 'x'})",
        "json.dumps({'number': 0, 'webp': '<script>'})",
        "json.dumps({'number': 0, 'webp': 'aGVsbG8gd29ybGQ='})",
        f"'x' * {2 * MAX_REPLY_BYTES}",
    ],
    ids=["no-json", "unknown-number", "no-base64", "no-webp", "too-long"],
)
def test_replies_that_are_none_are_refused(reply: str) -> None:
    """Nothing of them reaches the page."""
    made = make_thumbnails(["s3://a/b"], timeout_s=30, command=command(f"print({reply}, flush=True); time.sleep(60)"))
    assert made.by_reference == {}
    assert made.problem
    assert made.problem.startswith("the thumbnails command failed")


def test_no_reference_starts_no_command() -> None:
    """A page of errors alone needs no thumbnails."""
    assert make_thumbnails([], timeout_s=1, command=["/no/such/command"]).problem is None
