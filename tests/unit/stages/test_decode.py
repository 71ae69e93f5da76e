"""Right pixels for a moderator, and a stable code for everything that is no picture."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode import decoder as module
from shiwu_worker.stages.decode.decoder import decode, warm
from shiwu_worker.stages.decode.exif import exif_orientation
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support import pictures

SPEC = ImageSpec(64, 64, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CROP = ImageSpec(64, 64, "crop", 64, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LIMITS = DecodeLimits(max_pixels=50_000_000, max_side=16_384, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))


UNDONE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""Orientation → Pillow's number of the transposition that stores an upright image so."""


def oriented(kind: str, upright: Image.Image, orientation: int) -> bytes:
    """A file that stores the image turned, and says so as its format does: EXIF, or the boxes of AVIF and HEIF."""
    stored = upright.transpose(Image.Transpose(UNDONE[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    if kind in {"AVIF", "HEIF"}:
        options = {"quality": 95}
    return pictures.saved(stored, kind, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("spec", [SPEC, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_each_orientation_gives_the_upright_image(kind: str, spec: ImageSpec) -> None:
    """The orientation is applied once, and width and height are those of the upright picture."""
    warm()
    upright = pictures.picture("熊猫").convert("RGB").resize((120, 80))
    expected, _ = decode(pictures.png(upright), spec=spec, limits=LIMITS)
    limits = DecodeLimits(max_pixels=50_000_000, max_side=65_535, formats=(kind,))
    for orientation in range(1, 9):
        for exact in (False, True):
            pixels, info = decode(oriented(kind, upright, orientation), spec=spec, limits=limits, is_exact=exact)
            assert (info.width, info.height) == (120, 80), orientation
            assert np.abs(pixels.astype(int) - expected).mean() < 4, orientation


def exif_with(entry: bytes, *, order: str = "<", count: int = 1) -> bytes:
    """EXIF data of one directory entry."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}LH", 8, count) + entry + bytes(4)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (exif_with(struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)), 6),
        (b"Exif\0\0" + exif_with(struct.pack(">HHLHH", 0x0112, 3, 1, 8, 0), order=">"), 8),
        (exif_with(struct.pack("<HHLL", 0x0112, 4, 1, 3)), 3),
        (exif_with(struct.pack(">HHLBxxx", 0x0112, 1, 1, 3), order=">"), 3),
        (exif_with(struct.pack("<HHLHH", 0x0112, 3, 1, 9, 0)), 1),
        (exif_with(struct.pack("<HHLHH", 0x0112, 3, 1, 0, 0)), 1),
        (exif_with(struct.pack("<HHLHH", 0x0112, 2, 1, 6, 0)), 1),
        (exif_with(struct.pack("<HHLHH", 0x0113, 3, 1, 6, 0)), 1),
        (exif_with(struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0), count=65_535), 6),
        (exif_with(b"\x12\x01"), 1),
        (b"II*\0" + struct.pack("<L", 2**32 - 1), 1),
        (b"II*\0\x08", 1),
        (b"Exif\0\0", 1),
        (b"not EXIF at all", 1),
        (b"", 1),
    ],
)
def test_damaged_orientation_counts_as_upright(exif: bytes, orientation: int) -> None:
    """In either byte order; damaged EXIF data says nothing about the picture."""
    assert exif_orientation(exif) == orientation


def test_hidden_colours_have_no_influence() -> None:
    """Red under alpha 0 is white; half transparent black is grey."""
    image = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 8))
    assert decode(pictures.png(image), spec=SPEC, limits=LIMITS)[0][10:].min() == 255
    image = Image.new("RGBA", (80, 80), (0, 0, 0, 128))
    assert decode(pictures.png(image), spec=SPEC, limits=LIMITS)[0].mean() == pytest.approx(127, abs=2)


def test_sixteen_bits_of_grey_are_scaled_not_clipped() -> None:
    """A ramp over 16 bits stays a ramp."""
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(1, 256).repeat(64, axis=0)
    pixels, _ = decode(pictures.png(Image.fromarray(ramp)), spec=SPEC, limits=LIMITS)
    row = pixels[0, :, 0].astype(int)
    assert row[0] < 8
    assert row[-1] > 247
    assert 110 < row[32] < 146


def test_crop_keeps_the_aspect_ratio() -> None:
    """The middle of a wide picture, as transformers' processors cut it."""
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    assert decode(pictures.png(wide), spec=CROP, limits=LIMITS)[0].mean() > 250


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("size", [(512, 512), (333, 777), (640, 64), (64, 64), (1, 1), (10, 1000), (2000, 3)])
def test_fast_resize_is_within_a_few_levels_of_pillow(size: tuple[int, int], resample: int) -> None:
    """Compared with Pillow for every filter, on an image with edges; modes without a fast form use Pillow."""
    data = pictures.png(pictures.picture("熊猫").convert("RGB").resize(size))
    spec = ImageSpec(64, 64, "squash", None, resample, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    fast, exact = (decode(data, spec=spec, limits=LIMITS, is_exact=exact)[0].astype(int) for exact in (False, True))
    difference = np.abs(fast - exact)
    assert difference.max() <= 5
    assert difference.mean() <= 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_defect_after_the_decoder_is_not_the_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pixels are there, so `picture_broken` would be wrong; the job is retried."""
    warm()

    def resize(*_: object, **__: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(module, "model_pixels", resize)
    with pytest.raises(TypeError, match="a defect"):
        decode(pictures.saved(Image.new("RGB", (80, 60), (9, 90, 9)), kind), spec=SPEC, limits=LIMITS)


def test_every_variant_is_decoded_or_gives_its_code() -> None:
    """All kinds of the support's pictures: pixels, or a Rejected with a code of the decode stage."""
    for name, data in pictures.variants().items():
        if name in pictures.BAD:
            with pytest.raises(Rejected, match="expected"):
                decode(data, spec=SPEC, limits=LIMITS)
        else:
            pixels, info = decode(data, spec=SPEC, limits=LIMITS)
            assert pixels.shape == (64, 64, 3), name
            assert info.format in LIMITS.formats


def _header_of_a_large_png(width: int, height: int) -> bytes:
    """A small PNG whose header says another size."""
    raw = pictures.png(Image.new("L", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + raw[24:29]
    return raw[:12] + header + struct.pack(">I", zlib.crc32(header)) + raw[33:]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (_header_of_a_large_png(60_000, 60_000), r"at most 10000 pixels \(SHIWU_MAX_PIXELS\), got 3600000000$"),
        (
            pictures.png(Image.new("L", (200, 200))),
            r"\(SHIWU_MAX_PIXELS\) and 500 a side \(SHIWU_MAX_SIDE\), got 200 ×",
        ),
    ],
    ids=["Pillow's limit", "ours"],
)
def test_too_large_image_names_the_setting_and_one_limit(data: bytes, text: str) -> None:
    """Not twice the limit, as Pillow says, and no advice of its own about attacks."""
    with pytest.raises(Rejected, match=text) as caught:
        decode(data, spec=SPEC, limits=DecodeLimits(10_000, 500, ("PNG",)))
    assert "DOS" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "limits", "code"),
    [
        (b"", LIMITS, "picture_empty"),
        (b"<html>", LIMITS, "not_a_picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", LIMITS, "picture_unsupported"),
        (b"\x89PNG\r\n\x1a\n", LIMITS, "picture_broken"),
        (b"\xff\xd8\xff", LIMITS, "picture_broken"),
        (pictures.png(Image.new("L", (200, 200))), DecodeLimits(10_000, 16_384, ("PNG",)), "picture_too_large"),
        (pictures.png(Image.new("L", (200, 2))), DecodeLimits(10_000, 100, ("PNG",)), "picture_too_large"),
        (pictures.png(Image.new("L", (9, 9))), DecodeLimits(10_000, 100, ("JPEG",)), "picture_unsupported"),
    ],
)
def test_bytes_that_are_no_image_give_their_code(data: bytes, limits: DecodeLimits, code: str) -> None:
    """Detected by content and header, never by name."""
    with pytest.raises(Rejected) as caught:
        decode(data, spec=SPEC, limits=limits)
    assert caught.value.code.value == code
