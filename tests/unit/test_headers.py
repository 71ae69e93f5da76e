"""What is told of a file before a decoder sees it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from shiwu_worker.headers import has_more_chunks, has_more_scans, webp_size
from tests.support import bombs, pictures


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0II*\0"}])
@pytest.mark.parametrize("size", [(1, 1), (16_383, 2), (3, 700)])
def test_a_webps_size_is_its_canvas(options: dict[str, object], size: tuple[int, int]) -> None:
    """The three kinds of WebP."""
    assert webp_size(pictures.saved(Image.new("RGB", size), "WEBP", **options)) == size


def test_what_is_no_webp_has_no_such_size() -> None:
    """Other formats, an unknown kind, a file that ends too early."""
    data = pictures.webp(pictures.picture())
    for other in (pictures.png(pictures.picture()), data[:29], b"", data[:12] + b"VP9 " + data[16:]):
        assert webp_size(other) is None


def test_scans_are_counted_by_markers_and_not_by_bytes() -> None:
    """Thumbnails and other segments hold the same two bytes; they are no scans."""
    picture = pictures.picture()
    plain, progressive = pictures.jpeg(picture), pictures.progressive_jpeg(picture)
    with_thumbnails = progressive[:2] + b"\xff\xe1\xff\xfe" + b"\xff\xda" * 32_766 + progressive[2:]
    assert not has_more_scans(plain, 1)
    assert has_more_scans(progressive, 1)
    assert not has_more_scans(progressive, 20)
    assert not has_more_scans(with_thumbnails, 20)
    assert has_more_scans(with_thumbnails, 1)
    assert not has_more_scans(progressive + progressive * 20, 20), "what follows the end is no part of the picture"


def test_the_scan_bomb_is_one() -> None:
    """It decodes where nobody counts, so it is a real one, and it is stopped at the limit."""
    with Image.open(io.BytesIO(bombs.jpeg_scans(scans=30, side=64))) as image:
        image.load()
    assert has_more_scans(bombs.jpeg_scans(scans=30, side=64), 29)
    assert not has_more_scans(bombs.jpeg_scans(scans=30, side=64), 30)


def test_chunks_and_segments_are_counted() -> None:
    """Of PNG and JPEG; all else has none."""
    assert has_more_chunks(bombs.png_chunks(), 20_000)
    assert has_more_chunks(bombs.jpeg_segments(), 20_000)
    for make in pictures.GOOD.values():
        assert not has_more_chunks(make(pictures.picture()), 200)
    assert not has_more_chunks(b"", 0)
