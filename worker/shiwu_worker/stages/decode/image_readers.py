"""Opens an image of each format so that damaged metadata is ignored and missing pixels are detected."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from PIL import Image, ImageFile

from shiwu_worker.stages.decode.formats.isobmff import has_holes, without_exif
from shiwu_worker.stages.decode.formats.jpeg_decoder import load_jpeg, open_jpeg
from shiwu_worker.stages.decode.formats.jpeg_segments import read_header, read_scans
from shiwu_worker.stages.decode.formats.png_stream import load_png, open_png, read_png
from shiwu_worker.stages.decode.formats.webp_stream import load_webp, without_damaged_end
from shiwu_worker.stages.decode.image_errors import broken

_REPAIRS: Final = {"WEBP": without_damaged_end, "AVIF": without_exif}
"""Repairs that are tried when Pillow cannot open the image, perhaps because of damaged metadata."""
_ORIENTED_BY_EXIF: Final = {"WEBP", "AVIF"}
"""Formats whose orientation the EXIF data has. Pillow copies the orientation of an AVIF, which has its own boxes, into
the EXIF data. The readers of TIFF and HEIF turn the image themselves."""


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose header was read."""

    image: Image.Image
    load: Callable[[Image.Image], object]
    """Decodes the current frame; raises Rejected with picture_broken if pixels are missing."""
    exif: bytes
    """The EXIF data; empty if the format keeps the orientation elsewhere."""


def open_image(data: bytes, name: str, *, max_parts: int, max_scans: int) -> OpenedImage:
    """Read the header of an image of this format.

    Args:
        max_parts: most chunks of a PNG, or segments of a JPEG.
        max_scans: most scans of a JPEG.

    Raises:
        Rejected: picture_broken, picture_too_large or picture_unsupported.
        Exception: whatever Pillow raises for a header that it cannot read.
    """
    if name == "JPEG":
        return _open_jpeg(data, max_parts=max_parts, max_scans=max_scans)
    if name == "PNG":
        stream = read_png(data, max_chunks=max_parts)
        return OpenedImage(open_png(stream), lambda image: load_png(image, stream), stream.exif)
    image, used = _open_or_repair(data, name)
    loaders: dict[str, Callable[[Image.Image], object]] = {
        "WEBP": partial(load_webp, data=used),
        "GIF": partial(_load_gif, data=used),
        "AVIF": partial(_load_isobmff, data=used, name=name),
        "HEIF": partial(_load_isobmff, data=used, name=name),
    }
    exif = image.info.get("exif") if name in _ORIENTED_BY_EXIF else b""
    return OpenedImage(image, loaders.get(name, _load), exif if isinstance(exif, bytes) else b"")


def _open_jpeg(data: bytes, *, max_parts: int, max_scans: int) -> OpenedImage:
    header = read_header(data, max_segments=max_parts)

    def load(image: Image.Image) -> None:
        scans = [] if header.is_one_scan else read_scans(data, header, max_scans=max_scans, max_segments=max_parts)
        load_jpeg(image, data, header, scans)

    return OpenedImage(open_jpeg(header), load, header.exif)


def _open_or_repair(data: bytes, name: str) -> tuple[Image.Image, bytes]:
    """The image, and the bytes from which it was opened: the file, or the file without damaged metadata."""
    try:
        return Image.open(io.BytesIO(data), formats=(name,)), data
    except (OSError, ValueError, RuntimeError):
        repaired = _REPAIRS[name](data) if name in _REPAIRS else None
        if repaired is None:
            raise
        return Image.open(io.BytesIO(repaired), formats=(name,)), repaired


def _load(image: Image.Image) -> None:
    image.load()


def _load_isobmff(image: Image.Image, data: bytes, name: str) -> None:
    if has_holes(data):
        raise broken(f"expected a whole {name} image, got one with a hole of zeros in its image data")
    image.load()


def _load_gif(image: Image.Image, data: bytes) -> None:
    """Decode one frame of a GIF from its own data only.

    In an animation with missing pixels the decoder would read on into the next frame. After a still image there is no
    further data, so Pillow reports missing pixels itself.
    """
    if isinstance(image, ImageFile.ImageFile) and image.tile and getattr(image, "is_animated", False):
        tile = image.tile[0]
        end = tile.offset
        while end < len(data) and (size := data[end]):
            end += 1 + size
        image.fp = io.BytesIO(data[tile.offset : end])
        image.tile = [tile._replace(offset=0)]
    image.load()
