"""Reads a WebP's chunks: its size before Pillow opens it, damage beside the image, and a hole at its end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image

from shiwu_worker.stages.decode.image_errors import broken, require_memory

CANVAS_BYTES: Final = 16
"""For each pixel: two canvases of libwebp, its own buffers, and Pillow's image."""
HOLE_BYTES: Final = 64
"""Zeros at the end of the image data, of which it is then asked whether the decoder needs them."""
SPARE_BYTES: Final = 32
"""How many of them are left out then; encoders end with fewer bytes that no pixel needs."""
_RIFF_HEADER: Final = 12
_IMAGE: Final = {b"VP8 ", b"VP8L"}
_FRAME: Final = b"ANMF"
_FRAME_HEADER: Final = 16
MAX_CHUNKS: Final = 20_000


@dataclass(frozen=True, slots=True)
class _Chunk:
    kind: bytes
    begin: int
    """Where its data begins; its size stands in the four bytes before."""
    size: int

    @property
    def end(self) -> int:
        """Where the next chunk begins: sizes are padded to even ones."""
        return self.begin + self.size + self.size % 2


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas, or None where this is no WebP.

    Pillow allocates a WebP's canvas twice when it opens the file, before its size can be looked at.
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
    """The file up to the first chunk behind the image that does not fit, or None where all fit or the image does not.

    Metadata stands behind the image. When its chunk is damaged libwebp refuses all of the file.
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
        Rejected: picture_broken when the end of the image data is a hole of zeros. libwebp makes a flat area of it.
            The zeros of an image that is flat there are needed: without them the decoder fails.
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
        require_memory(CANVAS_BYTES * width * height)
        return False
    return True


def _without_zeros(data: bytes) -> bytes | None:
    """The file without the last zeros of its image data, or None where that does not end with a long run of them."""
    outer = None
    found = None
    for chunk in _chunks(data, _RIFF_HEADER, len(data)):
        if chunk.kind == _FRAME:
            outer, inner = chunk, _chunks(data, chunk.begin + _FRAME_HEADER, chunk.begin + chunk.size)
            found = next((one for one in inner if one.kind in _IMAGE), found)
        elif chunk.kind in _IMAGE:
            found = chunk
    if found is None or not data.endswith(bytes(HOLE_BYTES), found.begin, found.begin + found.size):
        return None
    size = (found.size - SPARE_BYTES) // 2 * 2
    end = found.begin + size
    body = bytearray(data[:end])
    body[4:8] = (end - 8).to_bytes(4, "little")
    body[found.begin - 4 : found.begin] = size.to_bytes(4, "little")
    if outer is not None:
        body[outer.begin - 4 : outer.begin] = (end - outer.begin).to_bytes(4, "little")
    return bytes(body)


def _chunks(data: bytes, at: int, end: int) -> Iterator[_Chunk]:
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            return
        chunk = _Chunk(data[at : at + 4], at + 8, int.from_bytes(data[at + 4 : at + 8], "little"))
        yield chunk
        at = chunk.end
