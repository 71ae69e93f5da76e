"""Reads the chunks of a WebP: its size before Pillow opens it, damaged metadata, and missing data at its end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image

from shiwu_worker.stages.decode.image_errors import broken, require_memory

CANVAS_BYTES_PER_PIXEL: Final = 16
"""Two canvases of libwebp, its own buffers, and the image of Pillow."""
HOLE_BYTES: Final = 64
"""Number of zeros at the end of the image data from which on a check decides whether the decoder needs them."""
SPARE_BYTES: Final = 32
"""How many of these zeros the check removes; encoders append fewer bytes that no pixel needs."""
_RIFF_HEADER: Final = 12
_IMAGE: Final = {b"VP8 ", b"VP8L"}
_FRAME: Final = b"ANMF"
_FRAME_HEADER: Final = 16
MAX_CHUNKS: Final = 20_000


@dataclass(frozen=True, slots=True)
class _Chunk:
    kind: bytes
    begin: int
    """Where its data begins; the four bytes before are its size."""
    size: int

    @property
    def end(self) -> int:
        """Where the next chunk begins; chunks are padded to an even size."""
        return self.begin + self.size + self.size % 2


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas of a WebP, or None if this is no WebP.

    Pillow allocates the canvas twice when it opens the file, before its size can be checked.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def without_damaged_end(data: bytes) -> bytes | None:
    """The file up to the first damaged chunk after the image, or None if no chunk or the image itself is damaged.

    Metadata follows the image. If its chunk is damaged, libwebp rejects the whole file.
    """
    end, has_image = _RIFF_HEADER, False
    for chunk in _chunks(data, _RIFF_HEADER, len(data)):
        if chunk.end > len(data):
            break
        end, has_image = chunk.end, has_image or chunk.kind in _IMAGE or chunk.kind == _FRAME
    if not has_image or end == len(data):
        return None
    return b"RIFF" + (end - 8).to_bytes(4, "little") + data[8:end]


def load_webp(image: Image.Image, data: bytes) -> None:
    """Decode the current frame.

    Raises:
        Rejected: picture_broken when zeros replace the end of the image data. libwebp makes a flat area of them. If
            the image is really flat there, the zeros are needed: without them the decoder fails.
    """
    image.load()
    if getattr(image, "n_frames", 1) == 1 and (shorter := _without_zeros(data)) and _is_decodable(shorter):
        raise broken("expected a whole WEBP image, got one with a damaged end")


def _is_decodable(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            image.load()
    except (OSError, EOFError, ValueError):
        width, height = webp_size(data) or (0, 0)
        require_memory(CANVAS_BYTES_PER_PIXEL * width * height)
        return False
    return True


def _without_zeros(data: bytes) -> bytes | None:
    """The file without the last zeros of its image data, or None if these do not end with a long run of zeros."""
    frame = None
    image = None
    for chunk in _chunks(data, _RIFF_HEADER, len(data)):
        if chunk.kind == _FRAME:
            frame, inner = chunk, _chunks(data, chunk.begin + _FRAME_HEADER, chunk.begin + chunk.size)
            image = next((part for part in inner if part.kind in _IMAGE), image)
        elif chunk.kind in _IMAGE:
            image = chunk
    if image is None or not data.endswith(bytes(HOLE_BYTES), image.begin, image.begin + image.size):
        return None
    size = (image.size - SPARE_BYTES) // 2 * 2
    end = image.begin + size
    body = bytearray(data[:end])
    body[4:8] = (end - 8).to_bytes(4, "little")
    body[image.begin - 4 : image.begin] = size.to_bytes(4, "little")
    if frame is not None:
        body[frame.begin - 4 : frame.begin] = (end - frame.begin).to_bytes(4, "little")
    return bytes(body)


def _chunks(data: bytes, at: int, end: int) -> Iterator[_Chunk]:
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            return
        chunk = _Chunk(data[at : at + 4], at + 8, int.from_bytes(data[at + 4 : at + 8], "little"))
        yield chunk
        at = chunk.end
