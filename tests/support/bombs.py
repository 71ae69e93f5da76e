"""Pictures that were made to do harm, each generated when asked: small files that cost memory, CPU or the wrong tag."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Final

from PIL import Image, PngImagePlugin

from tests.support import pictures

MAX_PIXELS: Final = 50_000_000
"""The worker's default limit, just below and above which most bombs lie."""
FULL: Final = (7000, 7000)
BELOW: Final = (3000, 3000)
"""Of the bombs that are allowed, where they run every day; `make hostile` has them in full."""
ABOVE: Final = (7200, 7200)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 0, rows: bytes | None = None
) -> bytes:
    """A PNG put together by hand; `rows` are packed by the caller, None has a black picture of grey."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = zlib.compress((b"\0" + bytes(width)) * height) if rows is None else rows
    tail = (png_chunk(b"IDAT", body), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + b"".join(tail)


def webp_pixels() -> bytes:
    """34 bytes that say 16383 × 16383, and make a decoder allocate it before any check."""
    bits = (16_383 - 1) | (16_383 - 1) << 14
    body = b"VP8L" + struct.pack("<I", 14) + b"\x2f" + struct.pack("<I", bits) + bytes(9)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_plain(size: tuple[int, int] = BELOW) -> bytes:
    """A lossless WebP of one colour just below the limit: some hundred bytes, some hundred megabytes."""
    return pictures.saved(Image.new("RGB", size, "red"), "WEBP", lossless=True, quality=0, method=0)


def png_pixels() -> bytes:
    """52 megapixels of nothing."""
    return pictures.saved(Image.new("L", ABOVE), "PNG", compress_level=9)


def png_below(size: tuple[int, int] = BELOW) -> bytes:
    """49 megapixels in RGBA: allowed, and the most memory that is."""
    return pictures.saved(Image.new("RGBA", size, (255, 0, 0, 128)), "PNG", compress_level=1)


def png_line() -> bytes:
    """A header of 1 × 80,000,000 without data."""
    return raw_png(1, 80_000_000, rows=b"")


def png_no_pixels() -> bytes:
    """A header within the limit and no data behind it."""
    return raw_png(7000, 7000, rows=b"")


def png_text() -> bytes:
    """64 MB of text in a few kilobytes (zTXt), and more of it."""
    packed = zlib.compress(bytes(64 << 20), 9)
    return raw_png(8, 8, *[png_chunk(b"zTXt", b"Comment\0\0" + packed)] * 20)


def png_many_texts() -> bytes:
    """Texts that are each below Pillow's limit for one: together over its limit for all."""
    packed = zlib.compress(b"a" * (1 << 20), 9)
    return raw_png(8, 8, *[png_chunk(b"zTXt", b"k%d\0\0" % number + packed) for number in range(80)])


def png_profile() -> bytes:
    """A colour profile that unpacks to 64 MB."""
    return raw_png(8, 8, png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(64 << 20), 9)))


def png_chunks() -> bytes:
    """A million empty chunks."""
    return raw_png(8, 8, png_chunk(b"teSt", b"") * 1_000_000)


def png_apng_count() -> bytes:
    """An animation that says to have four thousand million frames."""
    return raw_png(8, 8, png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))


def png_exif() -> bytes:
    """EXIF of many megabytes whose directory points into itself."""
    entry = struct.pack(">HHII", 0x8769, 4, 1, 8)
    directory = b"MM\0*\0\0\0\x08" + struct.pack(">H", 65_535) + entry * 65_535 + struct.pack(">I", 8)
    return raw_png(8, 8, png_chunk(b"eXIf", directory + bytes(4 << 20)))


def jpeg_scans(scans: int = 2000, side: int = 7000) -> bytes:
    """A progressive JPEG with this many scans of a few bytes, each of which costs a pass over all pixels."""
    blocks = ((side + 7) // 8) ** 2
    first = _bits(["00"] * blocks)  # no difference: each DC is the last one's
    later = _empty_blocks(blocks)
    quantiser = _segment(0xDB, b"\0" + b"\1" * 64)
    frame = _segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    codes = bytes([0, 1]) + bytes(14)  # one code of two bits
    tables = _segment(0xC4, b"\0" + codes + b"\0") + _segment(0xC4, b"\x10" + bytes([0, 2]) + bytes(14) + b"\0\xe0")
    start = _segment(0xDA, b"\1\1\0\0\0\0") + first
    again = _segment(0xDA, b"\1\1\0\1\x3f\0") + later
    return b"\xff\xd8" + quantiser + frame + tables + start + again * (scans - 1) + b"\xff\xd9"


def _segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def _bits(codes: Iterable[str]) -> bytes:
    text = "".join(codes)
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")


def _empty_blocks(blocks: int) -> bytes:
    """Runs of up to 32,767 blocks without a coefficient: the code 01 (EOB14) and 14 bits of its length."""
    codes = []
    while blocks >= 1 << 14:
        run = min(blocks, (1 << 15) - 1)
        codes.append("01" + format(run - (1 << 14), "014b"))
        blocks -= run
    codes += ["00"] * blocks
    return _bits(codes)


def jpeg_pixels() -> bytes:
    """A JPEG of 52 megapixels."""
    return pictures.saved(Image.new("L", ABOVE), "JPEG", quality=10)


def jpeg_below(size: tuple[int, int] = BELOW) -> bytes:
    """A progressive JPEG in print's colours just below the limit."""
    return pictures.saved(Image.new("CMYK", size, (9, 99, 9, 9)), "JPEG", quality=20, progressive=True)


def jpeg_segments() -> bytes:
    """Half a million comments before the picture."""
    plain = pictures.jpeg(Image.new("RGB", (64, 64)))
    return plain[:2] + _segment(0xFE, b"") * 500_000 + plain[2:]


def jpeg_profile() -> bytes:
    """A colour profile in 255 parts of 64 KB."""
    plain = pictures.jpeg(Image.new("RGB", (64, 64)))
    parts = b"".join(_segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 255]) + bytes(65_000)) for n in range(1, 256))
    return plain[:2] + parts + plain[2:]


def gif_pixels() -> bytes:
    """A GIF of 52 megapixels."""
    return pictures.saved(Image.new("L", ABOVE), "GIF")


def gif_frames(count: int = 200_000) -> bytes:
    """A tiny GIF with very many frames."""
    one = pictures.saved(Image.new("L", (1, 1)), "GIF")
    at = one.index(b"\x2c")
    return one[:at] + one[at:-1] * count + b";"


def gif_grows() -> bytes:
    """A GIF of 10 × 10 whose first frame is 60,000 × 60,000."""
    body = bytearray(pictures.saved(Image.new("L", (10, 10)), "GIF"))
    at = body.index(b"\x2c\0\0\0\0\x0a\0\x0a\0")
    body[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(body)


def avif_pixels(size: tuple[int, int] = BELOW) -> bytes:
    """An AVIF of a few hundred bytes just below the limit."""
    return pictures.saved(Image.new("RGB", size, "red"), "AVIF", quality=20, speed=10)


def tiff_tags() -> bytes:
    """A TIFF directory of 65,535 entries that all point to the same megabyte."""
    entries = b"".join(struct.pack("<HHII", 50_000, 1, 1 << 20, 8) for _ in range(65_535))
    return b"II*\0" + struct.pack("<I", 8 + (1 << 20)) + bytes(1 << 20) + struct.pack("<H", 65_535) + entries + bytes(4)


def webp_frames(count: int = 20_000) -> bytes:
    """A WebP of 16 × 16 with very many frames."""
    one = pictures.saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    frame = struct.pack("<I", 0)[:3] * 2 + b"\x0f\0\0" * 2 + b"\x64\0\0\0" + one
    body = b"VP8X" + struct.pack("<IB3x", 10, 2) + b"\x0f\0\0" * 2 + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body += (b"ANMF" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)) * count
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def truncations() -> dict[str, bytes]:
    """Every kind of good file, cut at several places."""
    found = {}
    for name, data in pictures.variants().items():
        if name != "large.jpg":
            for share in (0.05, 0.5, 0.95):
                found[f"cut-{share}-{name}"] = data[: int(len(data) * share)]
    return found


def changed(data: bytes, chance: random.Random) -> bytes:
    """The same with up to a dozen bytes overwritten, most of them near the beginning, where headers are."""
    body = bytearray(data)
    for _ in range(chance.randrange(1, 12)):
        end = len(body) if chance.random() < 0.3 else min(len(body), 256)
        body[chance.randrange(4, end)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(body)


def png_with_text() -> bytes:
    """Not a bomb: a text of half a megabyte, as programs that make pictures write it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (1 << 19), zip=True)
    return pictures.saved(Image.new("RGB", (64, 64), "green"), "PNG", pnginfo=info)


BOMBS: Final[dict[str, Callable[[], bytes]]] = {
    make.__name__: make
    for make in (
        webp_pixels,
        webp_plain,
        webp_frames,
        png_pixels,
        png_below,
        png_line,
        png_no_pixels,
        png_text,
        png_many_texts,
        png_profile,
        png_chunks,
        png_apng_count,
        png_exif,
        jpeg_scans,
        jpeg_pixels,
        jpeg_below,
        jpeg_segments,
        jpeg_profile,
        gif_pixels,
        gif_frames,
        gif_grows,
        avif_pixels,
        tiff_tags,
    )
}
"""name → maker."""
HARMLESS: Final = {
    "webp_plain": "WEBP",
    "png_below": "PNG",
    "jpeg_below": "JPEG",
    "avif_pixels": "AVIF",
    "gif_frames": "GIF",
    "jpeg_profile": "JPEG",
    "png_exif": "PNG",
    "png_text": "PNG",
    "png_many_texts": "PNG",
    "png_profile": "PNG",
}
"""Bombs that are decoded: large and within every limit, or with a bomb in a part that is not read."""


def all_files() -> dict[str, bytes]:
    """Every bomb, those that are allowed in full size, and every truncation: name → bytes."""
    full = {f"full_{make.__name__}": make(FULL) for make in (webp_plain, png_below, jpeg_below, avif_pixels)}
    return {name: make() for name, make in BOMBS.items()} | full | truncations()
