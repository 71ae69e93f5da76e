"""Has thumbnails made by the worker package, in a process of its own.

The bytes of the images are untrusted, so they are decoded in the worker's sandbox and never here. This package does
not import the worker: it starts the worker's command where that is installed, and exchanges JSON lines with it.
"""

from __future__ import annotations

import base64
import binascii
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Final

import msgspec

from shiwu.contract import printable

COMMAND: Final = (sys.executable, "-P", "-m", "shiwu_worker.commands.thumbnails")
MAX_REPLY_BYTES: Final = 256 * 1024
"""A reply has at most 160 × 160 pixels as WebP, in base64."""
READ_BYTES: Final = 64 * 1024
STOP_S: Final = 5.0
NOT_INSTALLED: Final = "the worker's libraries are not installed here (pip install '.[worker]' in a clone of shiwu)"


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """What became of one reference: WebP in base64, or the code of the error."""

    webp: str | None = None
    sha256: str | None = None
    """Of the image from which the thumbnail was made."""
    code: str | None = None


@dataclass(slots=True)
class Thumbnails:
    """Thumbnails by reference, and why some are missing."""

    by_reference: dict[str, Thumbnail] = field(default_factory=dict)
    problem: str | None = None
    """Why the command ended early; None where every reference was answered."""


class _Reply(msgspec.Struct, frozen=True):
    number: int
    webp: str | None = None
    sha256: str | None = None
    code: str | None = None


class _Request(msgspec.Struct, frozen=True):
    number: int
    image: str


_REPLY: Final = msgspec.json.Decoder(_Reply)


def make_thumbnails(
    references: Sequence[str],
    *,
    timeout_s: float,
    command: Sequence[str] = COMMAND,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Thumbnails:
    """Have a thumbnail made of each reference; blocks for at most `timeout_s` and a few seconds.

    Args:
        references: without duplicates.
        on_progress: called with the number of references that are answered.
    """
    made = Thumbnails()
    if not references:
        return made
    with tempfile.TemporaryFile() as requests, tempfile.TemporaryFile() as errors:
        # A file and no pipe: the command reads it at its own pace while this process reads the replies.
        for number, reference in enumerate(references):
            requests.write(msgspec.json.encode(_Request(number, reference)) + b"\n")
        requests.seek(0)
        with subprocess.Popen(command, stdin=requests, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                for reply in _replies(process.stdout, until_s=time.monotonic() + timeout_s):
                    made.by_reference[references[reply.number]] = _checked(reply)
                    on_progress(len(made.by_reference))
                code = process.wait(STOP_S)
                if len(made.by_reference) < len(references):
                    made.problem = _reason(errors) or f"the thumbnails command ended with exit code {code}"
            except TimeoutError:
                made.problem = f"thumbnails took longer than {timeout_s:g} s"
            except (ValueError, IndexError, subprocess.TimeoutExpired) as error:
                made.problem = f"the thumbnails command failed ({type(error).__name__})"
            finally:
                process.kill()
    return made


def _replies(stream: IO[bytes] | None, *, until_s: float) -> Iterator[_Reply]:
    """Replies until the command ends.

    Raises:
        TimeoutError: it goes on after `until_s`.
        ValueError: a line is no reply.
    """
    if stream is None:
        return
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, until_s - time.monotonic())):
                raise TimeoutError
            read = os.read(stream.fileno(), READ_BYTES)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            if len(rest) > MAX_REPLY_BYTES:
                raise ValueError("expected shorter lines")
            yield from map(_REPLY.decode, lines)


def _checked(reply: _Reply) -> Thumbnail:
    """The thumbnail, whose text goes into a data URL: base64 of WebP and nothing else.

    Raises:
        ValueError: it is something else.
    """
    if reply.webp is None:
        return Thumbnail(code=reply.code or "internal_error")
    try:
        data = base64.b64decode(reply.webp, validate=True)
    except binascii.Error as error:
        raise ValueError("expected base64") from error
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("expected WebP")
    return Thumbnail(webp=base64.b64encode(data).decode(), sha256=reply.sha256)


def _reason(errors: IO[bytes]) -> str | None:
    """The last line that the command wrote to standard error."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - READ_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    if not lines:
        return None
    return NOT_INSTALLED if lines[-1].startswith("ModuleNotFoundError") else printable(lines[-1])[:500]
