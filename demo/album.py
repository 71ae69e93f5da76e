"""The images of the demo: photographs with known words in many formats, and images with a known error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.servers import PictureServer, Reply, S3Server

from shiwu.contract import ErrorCode

PHOTOS: Final = Path(__file__).parent / "photos"
MISSING: Final = ErrorCode.SOURCE_NOT_FOUND
CONTENT_TYPES: Final = {".jpg": "jpeg", ".png": "png", ".webp": "webp", ".avif": "avif", ".gif": "gif"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to tag, and what is known about its answer."""

    reference: str
    form: str
    labels: tuple[str, ...] = ()
    """Labels that are right for a good image, the best one first."""
    code: ErrorCode | None = None
    """The error of a bad one."""
    name: str | None = None
    """What the table calls an image whose label is not known."""
    is_own: bool = False
    """Nothing is known about its answer."""

    @property
    def source(self) -> str:
        """http or s3."""
        return self.reference.partition(":")[0]


def lay_out(*, http: PictureServer, s3: S3Server, internal_url: str) -> list[Entry]:
    """Serve one half of the photographs over HTTP, and put the other half into the store."""
    samples: list[dict[str, Any]] = json.loads((PHOTOS / "samples.json").read_text(encoding="utf-8"))
    entries = [_entry(sample, http if number % 2 else s3) for number, sample in enumerate(samples)]
    return [
        *entries,
        Entry(http.url("/none.jpg"), "404", code=MISSING),
        Entry(http.serve("/page.jpg", Reply.html()), "HTML", code=ErrorCode.NOT_A_PICTURE),
        # A service of this machine that no producer should reach through the worker.
        Entry(internal_url, "internal port", code=ErrorCode.SOURCE_FORBIDDEN),
    ]


def _entry(sample: dict[str, Any], server: PictureServer | S3Server) -> Entry:
    name, code = sample["file"], ErrorCode(sample["error"]) if sample["error"] else None
    if code is MISSING:
        reference = f"s3://{server.bucket}/{name}" if isinstance(server, S3Server) else server.url(f"/{name}")
    else:
        data = (PHOTOS / name).read_bytes()
        if isinstance(server, S3Server):
            reference = server.put(name, data)
        else:
            kind = CONTENT_TYPES[Path(name).suffix]
            reference = server.serve(f"/{name}", Reply.picture(data, content_type=f"image/{kind}"))
    return Entry(reference, sample["form"], labels=tuple(sample["expected"] or ()) if code is None else (), code=code)
