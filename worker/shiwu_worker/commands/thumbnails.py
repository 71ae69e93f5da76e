"""Makes the thumbnails of `shiwu gallery`, as a process of its own: python -m shiwu_worker.commands.thumbnails.

Reads references as JSON lines from standard input and writes one JSON line for each to standard output, in the order in
which they are done. Fetches and decodes with the settings, the access rules and the sandbox of a worker. This process
itself sees raw pixels of a fixed size, never the bytes of an image.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from typing import BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shiwu.contract import ErrorCode, reference_error
from shiwu_worker.commands.command_loaders import CommandLoaders
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import FatalError
from shiwu_worker.loaders.protocol import Loaded, LoadFailed, LoadTask
from shiwu_worker.stages.decode.image_spec import ImageSpec

SIDE_PX: Final = 160
"""The longer side of a thumbnail."""
QUALITY: Final = 72
"""Of WebP, 0 to 100; a photograph takes some 5 kB."""
SLOTS: Final = 32
"""References that are fetched and decoded at a time."""
SPEC: Final = ImageSpec(
    width=SIDE_PX,
    height=SIDE_PX,
    resize="squash",
    shortest_edge=None,
    resample=int(Image.Resampling.BICUBIC),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
"""A square of the whole image; `to_webp` restores the proportions."""


class ThumbnailRequest(msgspec.Struct, frozen=True):
    """One line of standard input."""

    number: int
    image: str
    """The reference."""


class ThumbnailReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of standard output: a thumbnail, or the code of the error."""

    number: int
    webp: str | None = None
    """In base64."""
    sha256: str | None = None
    """Of the image's bytes, which may have changed since the image was tagged."""
    code: str | None = None


_REQUEST: Final = msgspec.json.Decoder(ThumbnailRequest)
_ENCODER: Final = msgspec.json.Encoder()


def make_thumbnails(requests: Iterable[ThumbnailRequest], settings: Settings) -> Iterator[ThumbnailReply]:
    """Load each image and yield its thumbnail, as they are done.

    Raises:
        FatalError: the loader processes cannot be kept running.
    """
    loaders = CommandLoaders(settings, SPEC, slots=SLOTS)
    with loaders.running():
        yield from _Loading(loaders).run(requests)


class _Loading:
    """Keeps the slots of the loaders filled."""

    def __init__(self, loaders: CommandLoaders) -> None:
        self._loaders = loaders
        self._free = list(range(SLOTS))
        self._numbers: dict[int, int] = {}
        """Ticket → number of the request."""

    def run(self, requests: Iterable[ThumbnailRequest]) -> Iterator[ThumbnailReply]:
        for ticket, request in enumerate(requests):
            if reference_error(request.image):
                yield ThumbnailReply(number=request.number, code=str(ErrorCode.INVALID_REFERENCE))
                continue
            while not self._free:
                yield from self._replies()
            self._numbers[ticket] = request.number
            self._loaders.submit([LoadTask(ticket=ticket, slot=self._free.pop(), image=request.image)])
        while self._numbers:
            yield from self._replies()

    def _replies(self) -> Iterator[ThumbnailReply]:
        for result in self._loaders.next_results():
            number = self._numbers.pop(result.ticket)
            yield _reply(number, result, self._loaders.pixels[result.slot])
            self._free.append(result.slot)


def _reply(number: int, result: Loaded | LoadFailed, pixels: NDArray[np.uint8]) -> ThumbnailReply:
    match result:
        case LoadFailed(error=error):
            return ThumbnailReply(number=number, code=str(error.code))
        case Loaded(width=width, height=height, sha256=sha256):
            webp = to_webp(pixels, width=width, height=height)
            return ThumbnailReply(number=number, webp=base64.b64encode(webp).decode(), sha256=sha256)


def to_webp(pixels: NDArray[np.uint8], *, width: int, height: int) -> bytes:
    """A thumbnail in the proportions of the image, which is not enlarged.

    Args:
        pixels: the whole image, resized to a square.
        width: of the image, in pixels.
        height: of the image, in pixels.
    """
    scale = min(1.0, SIDE_PX / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "WEBP", quality=QUALITY)
    return file.getvalue()


def run(lines: BinaryIO, replies: BinaryIO) -> int:
    """Answer every line of `lines` on `replies`; return the exit code."""
    try:
        with redirect_stdout(sys.stderr):  # the log of the loaders' pool
            settings = load_settings_or_exit()
            for reply in make_thumbnails(map(_REQUEST.decode, lines), settings):
                replies.write(_ENCODER.encode(reply) + b"\n")
                replies.flush()
    except FatalError as error:
        print(error, file=sys.stderr)  # noqa: T201 standard output carries the replies
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader has ended. The interpreter flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.stdin.buffer, sys.stdout.buffer))
