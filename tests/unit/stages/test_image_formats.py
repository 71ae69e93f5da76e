"""Which formats an operator may name, and what an image of another format is answered."""

from __future__ import annotations

import io
from typing import Final

import pytest
from PIL import Image
from pydantic import ValidationError

from shiwu_worker.config import types as config_lists
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode, warm
from shiwu_worker.stages.decode.image_formats import READABLE, identify
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support import pictures

SPEC: Final = ImageSpec(32, 32, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LIMITS: Final = DecodeLimits(max_pixels=1_000_000, max_side=65_535, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))


def test_formats_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any case; EPS, whose reader starts a program, is none, and neither is MPO, which has no reader of its own."""
    monkeypatch.setenv("SHIWU_FORMATS", "jpeg, png,TIFF")
    assert Settings().formats == ("JPEG", "PNG", "TIFF")
    for name in ("EPS", "MPO", "PDF"):
        monkeypatch.setenv("SHIWU_FORMATS", f"JPEG,{name}")
        with pytest.raises(ValidationError, match=f"expected formats of .*JPEG.* got {name}"):
            Settings()


def test_file_name_endings_are_accepted_as_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """People write what their files are called; a format that is named twice is one."""
    monkeypatch.setenv("SHIWU_FORMATS", "JPG,jpeg,tif,HEIC,apng")
    assert Settings().formats == ("JPEG", "TIFF", "HEIF", "PNG")


def test_heif_without_its_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named at the start, not at the first picture."""
    monkeypatch.setattr(config_lists, "find_spec", lambda name: None)
    for name in ("HEIF", "heic"):
        monkeypatch.setenv("SHIWU_FORMATS", f"JPEG,{name}")
        with pytest.raises(ValidationError, match=r"pip install '\.\[worker,heic\]'"):
            Settings()


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    """The first box of an ISO base media file."""
    body = b"ftyp" + major + bytes(4) + b"".join(compatible)
    return (4 + len(body)).to_bytes(4, "big") + body


UNSUPPORTED: Final = {
    "HEIF by its brand": (
        ftyp(b"heic", b"mif1", b"heic"),
        r"HEIF \(HEIC\): install pillow-heif for the worker and add HEIF to",
    ),
    "HEIF by a later brand": (ftyp(b"mif1", b"mif1", b"heix"), r"HEIF \(HEIC\): install"),
    "TIFF": (pictures.saved(Image.new("L", (8, 8)), "TIFF"), r"TIFF: add TIFF to SHIWU_FORMATS, or convert it"),
    "BigTIFF": (b"II+\0\x08\0\0\0" + bytes(8), r"TIFF: add TIFF"),
    "BMP": (pictures.saved(Image.new("L", (8, 8)), "BMP"), r"BMP: add BMP to SHIWU_FORMATS"),
    "JPEG XL": (b"\xff\x0a" + bytes(20), r"JPEG XL, which the worker cannot read: convert it to PNG or JPEG"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + ftyp(b"jxl "), r"JPEG XL, which"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + ftyp(b"jp2 "), r"JPEG 2000, which"),
    "PDF": (b"%PDF-1.7\n%\xe2", r"PDF, which the worker cannot read"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"SVG, which"),
    "SVG behind XML's declaration": (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg>", r"SVG, which"),
    "ICO": (pictures.saved(Image.new("L", (16, 16)), "ICO"), r"ICO, which"),
    "Photoshop": (b"8BPS\0\1" + bytes(20), r"Photoshop \(PSD\), which"),
    "PNM": (pictures.saved(Image.new("L", (8, 8)), "PPM"), r"PNM, which"),
    "camera raw": (ftyp(b"crx ", b"isom"), r"camera raw, which"),
    "DICOM": (bytes(128) + b"DICM", r"DICOM, which"),
}
NO_IMAGES: Final = {
    "nothing known": (b"hello world, this is text", r"got bytes that begin with b'hello world,'"),
    "a text about BMW": (b"BMW is a car, and this is text", r"bytes that begin with"),
    "a web page": (b"<!DOCTYPE html><svg></svg>", r"got HTML"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"got XML"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), r"got gzip data"),
    "a ZIP": (b"PK\x03\x04" + bytes(30), r"got ZIP archive"),
    "a video": (ftyp(b"isom", b"mp41"), r"got MP4 or QuickTime video"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", r"got Git LFS pointer"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_image_of_another_format_is_unsupported(name: str) -> None:
    """The answer names the format and what to do about it."""
    data, words = UNSUPPORTED[name]
    with pytest.raises(Rejected, match=r"expected JPEG, PNG, WEBP, GIF or AVIF, got " + words) as caught:
        decode(data, spec=SPEC, limits=LIMITS)
    assert caught.value.code.value == "picture_unsupported"


@pytest.mark.parametrize("name", NO_IMAGES)
def test_bytes_that_are_no_image_are_named(name: str) -> None:
    """The answer says what came, where that is known."""
    data, words = NO_IMAGES[name]
    with pytest.raises(Rejected, match=words) as caught:
        decode(data, spec=SPEC, limits=LIMITS)
    assert caught.value.code.value == "not_a_picture"


def test_every_readable_format_is_identified() -> None:
    """What Pillow writes in a format is identified as that format, decoded where it is accepted, and named if not."""
    warm()
    for name in sorted(READABLE):
        data = pictures.saved(pictures.picture().resize((64, 48)), name)
        found = identify(data)
        assert (found.name if found else None) == name
        accepting = DecodeLimits(max_pixels=1_000_000, max_side=65_535, formats=(name,))
        assert decode(data, spec=SPEC, limits=accepting)[1].format == name
        other = DecodeLimits(max_pixels=1_000_000, max_side=65_535, formats=("GIF" if name != "GIF" else "PNG",))
        with pytest.raises(Rejected, match=rf"expected \w+, got {name}\b") as caught:
            decode(data, spec=SPEC, limits=other)
        assert caught.value.code.value == "picture_unsupported"


def test_broken_header_is_not_reported_as_wrong_format() -> None:
    """Text and code agree: the file is of an accepted format, and broken."""
    for name in LIMITS.formats:
        data = pictures.saved(Image.new("RGB", (64, 48)), name)[:20]
        with pytest.raises(Rejected, match=rf"expected a whole {name} image, got one ") as it:
            decode(data, spec=SPEC, limits=LIMITS)
        assert it.value.code.value == "picture_broken"


def test_long_screenshot_is_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1080 × 20000 pixels are fewer than the limit of 50 million."""
    settings = Settings()
    limits = DecodeLimits(max_pixels=settings.max_pixels, max_side=settings.max_side, formats=settings.formats)
    data = pictures.saved(Image.new("P", (1080, 20_000)), "PNG")
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (1080, 20_000)
    assert decode(data, spec=SPEC, limits=limits)[1].height == 20_000
