"""Images that are damaged in every way that files get damaged, each made from a whole one when asked."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from PIL import Image

from tests.support import pictures
from tests.support.bombs import png_chunk

SHARES: Final = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""How much of a file is left."""
END_MARKERS: Final = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}
UNCOMPRESSED: Final = {"BMP", "BMP, palette", "TIFF"}
"""Zeros are black pixels here, so nothing tells that a file is damaged."""


ARITHMETIC_JPEG: Final = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/yQALCAAwAEABAREA/8wABgAQEAX/2gAIAQEAAD8A0hX1MWyls+dD9qrdQeqqAap3r5eR4fgsdFxBJCTCB9W/YL11VzSHYVgun8M8mTab"
    "AEQ/eUXXvW65PUXT+ygsidTRGAdVpAwzuoaBJ7cIkHMRH8j/AMkbCQ8N2HdxK6In2h9o2LskHAOTYJC9Zxa49i8Z4sxjWXxZr9MurftQjgo0He2t"
    "tPgF0KRIaf8AIvqlUSmafug+II7YnHRmlzGo5Iakm9EG3rdcwDRaZwiL/gN2hiY62qgCmr0+lbDe8QL4eOucQXaeudYR9irXvxbtVstCf4ebIrEm"
    "Sy+ftzZ3Z9CmhKpOfkzcd0dN+/SwQq71VWEXlM9InFQCT/8AIwKrG4Ry2RILdj60/sPnaorhuDdLtP4D6J5e9WhYSJc57j+Xzz0YESktEkveb4S1"
    "l+Js/R0sYd8dw1iyKuRBDv2PCXEQIe5AXW7icdEJF3EAE9u0DcueUlNIoZ/+gH8Aa1giSvQkMOcP/VS/3LXliACuhmjaN4enkHfiSapWhk05TZbQ"
    "HRlKnLlIxHwY2GxGKGT8hhg6ax0J5JwmM0XYzg428h6UJLzCS80ArM+uuMzoabTU9MfynBqWLsPrUjbcJzJaZDNuGivE3r/yikfwFkgJWqjRoqfX"
    "mlakx0dKA7C6NChw+VGO2sh5pEX8AdLEVOULsA1OWcdHMhjCo6wOKcneIAMo/9k="
)
"""The picture in grey, 64 × 48, in arithmetic codes, which Pillow reads and does not write."""


def kind_of(name: str) -> str:
    """Pillow's name of the format of a whole image's name."""
    return name.partition(",")[0]


def photo() -> Image.Image:
    """A picture with something in each of its corners."""
    return pictures.picture().resize((300, 260))


@cache
def whole_images() -> dict[str, bytes]:
    """Every variant of every format that keeps its pixels in another way."""
    pillow, image = pictures.saved, photo()
    grey = image.convert("L").quantize(200)
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    jpeg: dict[str, dict[str, Any]] = {
        "JPEG": {},
        "JPEG, optimised": {"optimize": True},
        "JPEG, progressive": {"progressive": True},
        "JPEG, restarts": {"restart_marker_rows": 1},
        "JPEG, progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
    }
    found = {name: pillow(image, "JPEG", quality=90, **options) for name, options in jpeg.items()}
    found |= {
        "JPEG, grey": pillow(image.convert("L"), "JPEG"),
        "JPEG, CMYK": pillow(image.convert("CMYK"), "JPEG"),
        "PNG": pillow(image, "PNG"),
        "PNG, stored": pillow(image, "PNG", compress_level=0),
        "PNG, palette": pillow(grey, "PNG"),
        "PNG, alpha": pillow(clear, "PNG"),
        "PNG, interlaced": interlaced_png(image),
        "WEBP": pillow(image, "WEBP", quality=85),
        "WEBP, lossless": pillow(image, "WEBP", lossless=True),
        "WEBP, alpha": pillow(clear, "WEBP", quality=85),
        "GIF": pillow(grey, "GIF"),
        "GIF, interlaced": pillow(grey, "GIF", interlace=1),
        "AVIF": pillow(image, "AVIF", quality=85, speed=9),
        "AVIF, alpha": pillow(clear, "AVIF", quality=85, speed=9),
        "HEIF": pictures.heic(image),
        "BMP": pillow(image, "BMP"),
        "BMP, palette": pillow(grey, "BMP"),
        "TIFF": pillow(image, "TIFF"),
        "TIFF, LZW": pillow(image, "TIFF", compression="tiff_lzw"),
        "TIFF, deflate": pillow(image, "TIFF", compression="tiff_deflate"),
    }
    return found


def interlaced_png(image: Image.Image) -> bytes:
    """A PNG in Adam7's seven passes, which Pillow reads and does not write."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = bytearray()
    for left, top, across, down in passes:
        for y in range(top, image.height, down):
            row = image.crop((0, y, image.width, y + 1)).tobytes()
            pixels = [row[3 * x : 3 * x + 3] for x in range(left, image.width, across)]
            rows += b"\0" + b"".join(pixels) if pixels else b""
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    parts = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(bytes(rows))), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cut, filled up with zeros, and both with the format's end marker behind it: how → bytes."""
    end = END_MARKERS.get(kind_of(name))
    for share in SHARES:
        left = data[: int(len(data) * share)]
        yield f"cut to {share:.0%}", left
        yield f"zeros after {share:.0%}", left.ljust(len(data), b"\0")
        if end:
            yield f"cut to {share:.0%}, end marker", left + end
            yield f"zeros after {share:.0%}, end marker", left.ljust(len(data) - len(end), b"\0") + end


def short_png(share: float, *, colour: int = 2, junk: bytes = b"", width: int = 40, height: int = 30) -> bytes:
    """A PNG whose compressed data is sound and ends after this share of its rows."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = b"".join(b"\0" + bytes([200]) * width * channels for _ in range(int(height * share)))
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header)]
    if colour == 3:
        chunks.append(png_chunk(b"PLTE", bytes(range(256)) * 3))
    chunks += [png_chunk(b"IDAT", zlib.compress(rows) + junk), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    """One segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return data[:2] + jpeg_segment(marker, body) + data[2:]


def with_chunk(data: bytes, kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = png_chunk(kind, body)
    if checksum is not None:
        chunk = chunk[:-4] + struct.pack(">I", checksum)
    return data[:33] + chunk + data[33:]


@cache
def damaged_beside_pixels() -> dict[str, bytes]:
    """Whole images with damaged, odd or very large metadata: every pixel is there."""
    jpeg, png = pictures.saved(photo(), "JPEG"), pictures.saved(photo(), "PNG")
    exif = Image.Exif()
    exif[0x010E] = "a description"
    found = {
        "PNG, tEXt with a wrong checksum": with_chunk(png, b"tEXt", b"a\0b", checksum=1),
        "PNG, iCCP with a wrong checksum": with_chunk(png, b"iCCP", b"a\0\0" + zlib.compress(b"x"), checksum=1),
        "PNG, unknown chunk with a wrong checksum": with_chunk(png, b"juNk", b"a", checksum=1),
        "PNG, eXIf that is none": with_chunk(png, b"eXIf", b"junk"),
        "PNG, short pHYs": with_chunk(png, b"pHYs", b"abc"),
        "PNG, short gAMA": with_chunk(png, b"gAMA", b"a"),
        "PNG, short cHRM": with_chunk(png, b"cHRM", b"a"),
        "PNG, empty sRGB": with_chunk(png, b"sRGB", b""),
        "PNG, short tRNS": with_chunk(png, b"tRNS", b"a"),
        "PNG, tRNS with a wrong checksum": with_chunk(png, b"tRNS", bytes(6), checksum=1),
        "PNG, short acTL": with_chunk(png, b"acTL", b"a"),
        "PNG, acTL with a wrong checksum": with_chunk(png, b"acTL", struct.pack(">II", 2, 0), checksum=1),
        "PNG, fcTL with odd sizes": with_chunk(
            with_chunk(png, b"fcTL", struct.pack(">IIIIIHHBB", 0, 9999, 9999, 0, 0, 1, 10, 0, 0)),
            b"acTL",
            struct.pack(">II", 1, 0),
        ),
        "PNG, iCCP of 1.5 MB": with_chunk(png, b"iCCP", b"a\0\0" + zlib.compress(bytes(1_500_000))),
        "PNG, XMP of 2 MB, packed": with_chunk(
            png, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 << 20))
        ),
        "PNG, XMP of 2 MB": with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"a" * (2 << 20)),
        "PNG, zTXt packed in an unknown way": with_chunk(png, b"zTXt", b"a\0\x09b"),
        "JPEG, short JFIF": with_segment(jpeg, 0xE0, b"JFIF\0"),
        "JPEG, short Adobe": with_segment(jpeg, 0xEE, b"Adobe"),
        "JPEG, short ICC": with_segment(jpeg, 0xE2, b"ICC_PROFILE\0"),
        "JPEG, cut Photoshop": with_segment(jpeg, 0xED, b"Photoshop 3.0\0008BIM\x04"),
        "JPEG, MPF that is none": with_segment(jpeg, 0xE2, b"MPF\0junk"),
        "JPEG, EXIF that is none": with_segment(jpeg, 0xE1, b"Exif\0\0junk"),
        "JPEG, XMP that is none": with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        "JPEG, junk between segments": jpeg[:20] + b"junk" + jpeg[20:],
    }
    for kind in ("JPEG", "WEBP", "AVIF", "PNG", "HEIF"):
        data = pictures.saved(photo(), kind, exif=exif.tobytes())
        at = min(place for order in (b"MM\0*", b"II*\0") if (place := data.find(order)) > 0)
        for how, body in {"no TIFF header": b"XXXX", "far away": data[at : at + 4] + b"\xff" * 4}.items():
            found[f"{kind}, EXIF with {how}"] = data[:at] + body + data[at + len(body) :]
    webp = pictures.saved(photo(), "WEBP", exif=exif.tobytes(), xmp=b"x" * 100)
    at = webp.index(b"XMP ")
    found["WEBP, XMP longer than the file"] = webp[: at + 4] + struct.pack("<I", 1 << 30) + webp[at + 8 :]
    found["WEBP, cut in its XMP"] = webp[:-20]
    return found


def pixels_of(data: bytes) -> Image.Image:
    """What Pillow makes of it."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")
