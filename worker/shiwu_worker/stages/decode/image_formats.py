"""Identifies the format of a file by its first bytes, and writes the advice for formats that are not accepted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 4096
"""Bytes in which the first tag of an SVG or of a web page is searched."""


@dataclass(frozen=True, slots=True)
class FileFormat:
    """The format of a file."""

    name: str
    """Pillow's name for formats that an operator can allow (`READABLE`); otherwise a common name."""
    is_image: bool = True


READABLE: Final = {"JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "HEIF"}
"""Formats for which the worker has a decoder; HEIF needs the extra `heic`."""
_PREFIXES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II\xbc", "JPEG XR"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "CUR"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"gimp xcf", "XCF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"FLIF", "FLIF"),
    (b"BPG\xfb", "BPG"),
    (b"icns", "ICNS"),
    (b"\x8aMNG", "MNG"),
    (b"\x8bJNG", "JNG"),
    (b"SIMPLE  =", "FITS"),
    (b"AT&TFORM", "DjVu"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"IIRO", "camera raw"),
    (b"IIRS", "camera raw"),
    (b"MMOR", "camera raw"),
)
_OTHER_PREFIXES: Final = (
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"git-lfs", "Git LFS pointer"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
_AVIF_BRANDS: Final = {b"avif", b"avis"}
_HEIF_BRANDS: Final = {
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"msf1", b"miaf", b"avci", b"avcs", b"jpeg"),
}
_BMP_HEADERS: Final = {12, 40, 52, 56, 64, 108, 124}
_PNM: Final = re.compile(rb"P[1-7][\s#]")
_TAGS: Final = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), FileFormat("SVG")),
    (re.compile(rb"<!doctype html|<html[\s>]|<head[\s>]|<body[\s>]", re.IGNORECASE), FileFormat("HTML", False)),
)


def identify(data: bytes) -> FileFormat | None:
    """The format of these bytes, or None if it is not known."""
    for prefix, name in _PREFIXES:
        if data.startswith(prefix):
            return FileFormat(name)
    for prefix, name in _OTHER_PREFIXES:
        if data.startswith(prefix):
            return FileFormat(name, is_image=False)
    return _in_container(data) or _by_structure(data) or _text(data[:HEAD_BYTES])


def _in_container(data: bytes) -> FileFormat | None:
    if data[:4] == b"RIFF":
        names = {b"WEBP": FileFormat("WEBP"), b"AVI ": FileFormat("AVI video", False)}
        return names.get(data[8:12], FileFormat("RIFF data", False))
    if data[4:8] != b"ftyp":
        return None
    size = min(int.from_bytes(data[:4], "big"), 1024)
    # The major brand, then the compatible ones after the minor version. mif1 alone is neither AVIF nor HEIC.
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, size, 4))}
    if brands & _AVIF_BRANDS:
        return FileFormat("AVIF")
    if brands & _HEIF_BRANDS:
        return FileFormat("HEIF")
    return FileFormat("camera raw") if data[8:12] == b"crx " else FileFormat("MP4 or QuickTime video", False)


def _by_structure(data: bytes) -> FileFormat | None:
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return FileFormat("BMP")
    if data[128:132] == b"DICM":
        return FileFormat("DICOM")
    if _PNM.match(data):
        return FileFormat("PNM")
    return FileFormat("PDF") if b"%PDF-" in data[:1024] else None


def _text(head: bytes) -> FileFormat | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"<"):
        return None
    # The first tag decides: a web page may contain a drawing.
    found = [(match.start(), kind) for pattern, kind in _TAGS if (match := pattern.search(text))]
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    return FileFormat("XML", False) if text.startswith(b"<?xml") else None


def refusal(found: FileFormat, accepted: tuple[str, ...]) -> str:
    """Why an image of a known format is not accepted, and what the operator or the producer can do about it."""
    text = f"expected {listed(accepted)}, got {found.name}"
    if found.name == "HEIF":
        return f"{text} (HEIC): install pillow-heif for the worker and add HEIF to SHIWU_FORMATS, or convert it to JPEG"
    if found.name in READABLE:
        return f"{text}: add {found.name} to SHIWU_FORMATS, or convert it to PNG or JPEG"
    return f"{text}, which the worker cannot read: convert it to PNG or JPEG"


def listed(names: tuple[str, ...]) -> str:
    """The names as an English enumeration."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
