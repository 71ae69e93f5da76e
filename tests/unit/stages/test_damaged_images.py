"""Whether an image is whole is decided by its pixels: not by an end marker, and not by what stands beside them."""

from __future__ import annotations

import random
import struct
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode, warm
from shiwu_worker.stages.decode.formats.isobmff import items
from shiwu_worker.stages.decode.formats.webp_stream import webp_size
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support import bombs, damage, pictures

SPEC: Final = ImageSpec(64, 64, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What Pillow says of odd metadata, which a worker's decoders ignore.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
LIMITS: Final = DecodeLimits(
    max_pixels=1_000_000,
    max_side=65_535,
    formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "HEIF"),
)
JPEGS: Final = [name for name in damage.whole_images() if damage.kind_of(name) == "JPEG"]


@pytest.fixture(scope="module", autouse=True)
def _decoders() -> None:
    warm()


@pytest.fixture
def whole() -> dict[str, bytes]:
    """Every variant of every format."""
    return damage.whole_images()


def outcome(data: bytes) -> str:
    """`tagged`, or the code of the error."""
    try:
        decode(data, spec=SPEC, limits=LIMITS)
    except Rejected as error:
        return error.code.value
    return "tagged"


def shown(data: bytes) -> NDArray[np.uint8]:
    """The model's pixels."""
    return decode(data, spec=SPEC, limits=LIMITS, is_exact=True)[0]


@pytest.mark.parametrize("name", damage.whole_images())
def test_damaged_image_is_broken(name: str, whole: dict[str, bytes]) -> None:
    """Cut or filled with zeros at any place, with an end marker behind it or not."""
    data = whole[name]
    assert outcome(data) == "tagged"
    found = {how: outcome(body) for how, body in damage.damaged(name, data)}
    if name in damage.UNCOMPRESSED:
        found = {how: code for how, code in found.items() if not how.startswith("zeros")}
    assert {how: code for how, code in found.items() if code != "picture_broken"} == {}


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_without_its_end_marker_is_complete(name: str, whole: dict[str, bytes]) -> None:
    """All pixels are there; the last byte may be missing alone."""
    data = whole[name]
    expected = shown(data)
    for body in (data[:-2], data[:-1]):
        np.testing.assert_array_equal(shown(body), expected)


@pytest.mark.parametrize("name", JPEGS)
def test_bytes_after_a_jpeg_are_ignored(name: str, whole: dict[str, bytes]) -> None:
    """Other images, videos, archives, zeros; padding before the end marker; more bytes of a marker."""
    data = whole[name]
    expected = shown(data)
    other = pictures.jpeg(Image.new("RGB", (64, 64), "red"))
    noise = random.Random(1).randbytes(5000)
    padded = [data[:-2] + bytes(count) + data[-2:] for count in (1, 8, 30)]
    padded += [data[:-2] + b"\xff" * 3 + data[-2:], data[:-2] + b"\x7f" + data[-2:]]
    for body in (data + other, data + noise, data + noise + b"\xff\xd9", data + bytes(3000), data + b"\xff", *padded):
        np.testing.assert_array_equal(shown(body), expected)


def test_image_without_its_pixels_is_broken(whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some damaged files have none after they were read, which Pillow tells only when the pixels are used."""

    def without_pixels(image: Any, **_: Any) -> Any:
        image.tile = []
        return image

    monkeypatch.setattr("shiwu_worker.stages.decode.decoder.flatten_to_rgb", without_pixels)
    with pytest.raises(Rejected, match="expected a whole PNG image"):
        decode(next(data for data in whole.values() if data.startswith(b"\x89PNG")), spec=SPEC, limits=LIMITS)


def test_jpeg_with_only_a_header_is_broken(whole: dict[str, bytes]) -> None:
    """The header, the start of the scan, and the end marker."""
    for name in JPEGS:
        data = whole[name]
        at = data.index(b"\xff\xda")
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        assert outcome(data[: at + 2 + length] + b"\xff\xd9") == "picture_broken", name
        assert outcome(data[:at]) == "picture_broken", name


def test_arithmetic_jpeg_is_complete_or_broken() -> None:
    """Its decoder cannot wait for more data; what encoders leave out at the end may be missing."""
    data = damage.ARITHMETIC_JPEG
    assert outcome(data) == outcome(data[:-2]) == outcome(data + b"behind it") == "tagged"
    for share in (0.3, 0.5, 0.7):
        left = data[: int(len(data) * share)]
        for body in (
            left,
            left + b"\xff\xd9",
            left.ljust(len(data), b"\0"),
            left.ljust(len(data), b"\0") + b"\xff\xd9",
        ):
            assert outcome(body) == "picture_broken", share


def test_jpeg_with_a_marker_in_its_data_is_broken(whole: dict[str, bytes]) -> None:
    """A decoder takes it for the end of the scan and fills the rest with grey."""
    for name in JPEGS:
        data = bytearray(whole[name])
        at = len(data) // 2
        data[at : at + 2] = b"\xff\xd9"
        assert outcome(bytes(data)) == "picture_broken", name


def test_progressive_jpeg_may_end_after_a_complete_scan(whole: dict[str, bytes]) -> None:
    """With fewer scans it is seen with less detail, as browsers show it; within a scan or between two it is broken."""
    data = whole["JPEG, progressive"]
    expected = shown(data).astype(int)
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    assert len(starts) == 10
    for before, at in pairwise(starts):
        # Tables of the next scan follow the data of the last one.
        end = data.find(b"\xff\xc4", before, at) if b"\xff\xc4" in data[before:at] else at
        fewer = data[:end] + b"\xff\xd9"
        assert np.abs(shown(fewer) - expected).mean() < 20
        assert outcome(data[: at + 4] + b"\xff\xd9") == "picture_broken"
        assert outcome(data[: end - 40] + b"\xff\xd9") == "picture_broken"


def test_jpeg_without_the_scans_of_its_colours_is_broken() -> None:
    """One scan for each colour, and only the first is there: a grey image that was none."""
    data = pictures.jpeg(pictures.picture().resize((64, 64)))
    at = data.index(b"\xff\xda")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    grey = pictures.saved(pictures.picture().resize((64, 64)).convert("L"), "JPEG", quality=92)
    scan = grey.index(b"\xff\xda")
    start = damage.jpeg_segment(0xDA, bytes((1, 1, 0, 0, 63, 0)))
    body = data[:at] + start + grey[scan + 2 + int.from_bytes(grey[scan + 2 : scan + 4], "big") :]
    assert length == 12
    assert outcome(body) == "picture_broken"


@st.composite
def jpegs(draw: st.DrawFn) -> tuple[bytes, int, tuple[int, int], bool]:
    """A JPEG of any size and kind, a place in its first scan's data, its size, and whether it is progressive."""
    width, height = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, (height, width, 3), np.uint8)
    smooth = pictures.picture().resize((width, height))
    image = draw(st.sampled_from([Image.fromarray(noise), smooth, Image.new("RGB", (width, height), "navy")]))
    options: dict[str, Any] = {"quality": draw(st.sampled_from([5, 50, 90])), "subsampling": draw(st.integers(0, 2))}
    is_progressive = draw(st.booleans())
    if draw(st.booleans()):
        options["restart_marker_blocks"] = draw(st.integers(1, 20))
    mode = draw(st.sampled_from(["RGB", "L"]))
    data = pictures.saved(image.convert(mode), "JPEG", progressive=is_progressive, **options)
    at = data.index(b"\xff\xda")
    begin = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    # A progressive JPEG's second scan begins with tables. Of its first scan, a dozen bytes may go unnoticed.
    end = data.index(b"\xff\xc4", begin) - 12 if is_progressive else len(data) - 2
    return data, draw(st.integers(begin, max(begin, end))), image.size, is_progressive


@settings(max_examples=150, deadline=None)
@given(jpegs())
def test_complete_jpegs_are_tagged_and_cut_ones_are_not(made: tuple[bytes, int, tuple[int, int], bool]) -> None:
    """Of every size, quality and kind: less than one block of pixels is as much as may be missing unnoticed."""
    data, cut, (width, height), is_progressive = made
    as_it_is = ImageSpec(width, height, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    whole = decode(data, spec=as_it_is, limits=LIMITS, is_exact=True)[0]
    np.testing.assert_array_equal(decode(data[:-2], spec=as_it_is, limits=LIMITS, is_exact=True)[0], whole)
    for body in (data[:cut], data[:cut] + b"\xff\xd9"):
        if outcome(body) == "tagged":
            assert not is_progressive
            found = decode(body, spec=as_it_is, limits=LIMITS, is_exact=True)[0]
            rows, columns = np.nonzero((found != whole).any(axis=2))
            # Sixteen pixels of a block, and one to which its colours are spread.
            assert not rows.size or (np.ptp(rows) <= 17 and np.ptp(columns) <= 17)


@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("junk", [b"", b"junk behind the end"])
def test_png_whose_data_ends_early_is_broken(colour: int, junk: bytes) -> None:
    """Sound compressed data for some of the rows, in every colour type; the last row is looked at."""
    assert outcome(damage.short_png(1.0, colour=colour, junk=junk)) == "tagged"
    for share in (0.0, 1 / 3, 0.97):
        assert outcome(damage.short_png(share, colour=colour, junk=junk)) == "picture_broken", share


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (8, 8), (33, 17)])
def test_small_interlaced_pngs_are_complete(size: tuple[int, int]) -> None:
    """Passes without pixels included; without its last pass an image is broken."""
    image = pictures.picture().resize(size)
    data = damage.interlaced_png(image)
    assert np.abs(shown(data).astype(int) - shown(pictures.png(image))).max() == 0
    rows = damage.interlaced_png(image.crop((0, 0, max(1, size[0] // 2), max(1, size[1] // 2))))
    short = data[:16] + data[16:33] + rows[33:]
    assert outcome(short) == ("tagged" if size == (1, 1) else "picture_broken")


def test_png_in_the_colour_of_the_mark_is_complete() -> None:
    """The row that shows whether all was decoded may really have the colour of the mark that is put there first."""
    for mode, colour in {
        "RGB": (165, 90, 201),
        "RGBA": (165, 90, 201, 255),
        "L": 165,
        "LA": (165, 255),
        "1": 1,
    }.items():
        image = Image.new(mode, (40, 30), colour)
        assert outcome(pictures.png(image)) == "tagged", mode
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((165, 90, 201), (0, 0, 0))]
    data = pictures.saved(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100)
    assert outcome(data) == "tagged"


def test_only_the_decoded_frame_must_be_complete(whole: dict[str, bytes]) -> None:
    """Damage in the first frame of an animated PNG is noticed, damage in a later one does not matter."""
    first, second = damage.photo(), damage.photo().rotate(90)
    data = pictures.saved(first, "PNG", save_all=True, append_images=[second], duration=100)
    begin, later = data.index(b"IDAT") + 4, data.index(b"fdAT") + 8
    assert outcome(data) == "tagged"
    assert outcome(data[: begin + (later - begin) // 2]) == "picture_broken"
    assert outcome(data[: later + 100]) == "tagged"


def test_animation_with_a_short_first_frame_is_broken() -> None:
    """The decoder would read on into the next frame."""
    first, second = pictures.picture().resize((120, 90)).quantize(64), Image.new("L", (120, 90)).quantize(64)
    data = pictures.saved(first, "GIF", save_all=True, append_images=[second], duration=100, optimize=False)
    with Image.open(pictures.as_file(data)) as image:
        begin = middle = end = image.tile[0][2]  # type: ignore[attr-defined]  # what readers of files have
    while data[end]:
        end += 1 + data[end]
    while middle - begin < (end - begin) // 2:
        middle += 1 + data[middle]
    assert outcome(data) == "tagged"
    assert outcome(data[:middle] + data[end:]) == "picture_broken"


@pytest.mark.parametrize("name", damage.damaged_beside_pixels())
def test_damaged_metadata_is_ignored(name: str) -> None:
    """Every pixel is there, and is what it was."""
    data = damage.damaged_beside_pixels()[name]
    expected = shown(pictures.saved(damage.photo(), damage.kind_of(name)))
    assert np.abs(shown(data).astype(int) - expected).mean() < 3


def test_jpeg_of_12_bits_is_unsupported() -> None:
    """Text and code say the same: it is a JPEG, and not of a kind that is read."""
    data = bytearray(pictures.jpeg(damage.photo()))
    at = data.index(b"\xff\xc0")
    for place, value, words in ((4, 12, "12 bits"), (9, 2, "got 2"), (1, 0xC5, "hierarchical")):
        changed = bytearray(data)
        changed[at + place] = value
        with pytest.raises(Rejected, match=f"expected .*JPEG.*{words}.*convert it") as caught:
            decode(bytes(changed), spec=SPEC, limits=LIMITS)
        assert caught.value.code.value == "picture_unsupported"


def test_flat_images_are_complete() -> None:
    """Their data is full of zeros, as a hole in a file is."""
    flat = Image.new("RGB", (1500, 600), "white")
    flat.paste(pictures.picture().resize((200, 200)), (20, 20))
    for kind, options in (
        ("JPEG", {"optimize": True, "quality": 50}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
        ("AVIF", {"quality": 60, "speed": 10}),
        ("HEIF", {"quality": 60}),
        ("PNG", {}),
        ("GIF", {}),
    ):
        assert outcome(pictures.saved(flat, kind, **options)) == "tagged", (kind, options)


def test_scans_are_counted_by_markers_and_not_by_bytes() -> None:
    """Thumbnails and other segments hold the same two bytes; they are no scans."""
    progressive = pictures.progressive_jpeg(pictures.picture())
    with_thumbnails = damage.with_segment(progressive, 0xE1, b"\xff\xda" * 32_000)
    few, many = (
        DecodeLimits(max_pixels=1_000_000, max_side=16_384, formats=("JPEG",), max_scans=limit) for limit in (9, 10)
    )
    for data in (progressive, with_thumbnails, progressive + progressive * 20):
        assert decode(data, spec=SPEC, limits=many)
        with pytest.raises(Rejected, match=r"at most 9 scans \(SHIWU_MAX_SCANS\), got more") as caught:
            decode(data, spec=SPEC, limits=few)
        assert caught.value.code.value == "picture_too_large"
    assert decode(pictures.jpeg(pictures.picture()), spec=SPEC, limits=few), "one scan is not counted"


@pytest.mark.parametrize("scans", [30, 31])
def test_scan_bomb_is_stopped_at_the_limit(scans: int) -> None:
    """It decodes where it is within the limit, so it is a real one."""
    limits = DecodeLimits(max_pixels=1_000_000, max_side=16_384, formats=("JPEG",), max_scans=30)
    data = bombs.jpeg_scans(scans=scans, side=64)
    if scans == 30:
        assert decode(data, spec=SPEC, limits=limits)
    else:
        with pytest.raises(Rejected, match="at most 30 scans"):
            decode(data, spec=SPEC, limits=limits)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bombs.png_chunks(), "PNG of at most 20000 chunks"),
        (bombs.jpeg_segments(), "JPEG of at most 20000 segments before its pixels"),
        (b"\xff\xd8\xff\xe0" + b"\0\2\xff\0" * 500_000, "JPEG of at most 20000 segments before its pixels"),
    ],
)
def test_chunks_and_segments_are_counted(data: bytes, words: str) -> None:
    """Each of them is read in Python."""
    with pytest.raises(Rejected, match=words) as caught:
        decode(data, spec=SPEC, limits=LIMITS)
    assert caught.value.code.value == "picture_too_large"


def test_segments_between_scans_are_counted() -> None:
    """A million comments between two scans."""
    data = pictures.progressive_jpeg(pictures.picture())
    at = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    with pytest.raises(Rejected, match="at most 20000 segments between its scans"):
        decode(data[:at] + damage.jpeg_segment(0xFE, b"") * 100_000 + data[at:], spec=SPEC, limits=LIMITS)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0II*\0"}])
@pytest.mark.parametrize("size", [(1, 1), (16_383, 2), (3, 700)])
def test_size_of_a_webp_is_its_canvas(options: dict[str, Any], size: tuple[int, int]) -> None:
    """The three kinds of WebP."""
    assert webp_size(pictures.saved(Image.new("RGB", size), "WEBP", **options)) == size


def test_other_files_have_no_webp_size() -> None:
    """Other formats, an unknown kind, a file that ends too early."""
    data = pictures.webp(pictures.picture())
    for other in (pictures.png(pictures.picture()), data[:29], b"", data[:12] + b"VP9 " + data[16:]):
        assert webp_size(other) is None


def test_readable_items_of_damaged_boxes_are_found() -> None:
    """Boxes that lie about sizes, counts and places end the reading, and cost nothing."""
    data = bytearray(pictures.avif(damage.photo()))
    assert [item.kind for item in items(bytes(data))] == [b"av01"]
    at = data.index(b"iloc")
    for place, value in ((at + 10, b"\xff\xff"), (at - 4, struct.pack(">I", 7)), (at + 8, b"\xff\xff")):
        changed = data.copy()
        changed[place : place + len(value)] = value
        assert len(items(bytes(changed))) <= 5000
        assert outcome(bytes(changed)) in {"tagged", "picture_broken"}
    assert items(b"") == items(bytes(100)) == items(b"\0\0\0\1meta" + b"\xff" * 8) == []
