"""The pictures of the demo: good ones in many formats with a known label, and broken ones with a known error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Final

from PIL import Image
from tests.support import pictures
from tests.support.servers import PictureServer, Reply, S3Server

from shiwu.contract import ErrorCode

FORMATS: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "JPEG": pictures.jpeg,
    "PNG": pictures.png,
    "WebP": pictures.webp,
    "RGBA PNG": pictures.rgba_png,
    "12 MP JPEG": pictures.large_jpeg,
    "EXIF-turned": pictures.turned_jpeg,
    "AVIF": pictures.avif,
    "progressive": pictures.progressive_jpeg,
    "GIF": pictures.gif,
    "CMYK JPEG": pictures.cmyk_jpeg,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture to ask about, and what is known about its answer."""

    reference: str
    form: str
    label: str | None = None
    """The label of a good picture."""
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
    """Make all pictures, serve one half over HTTP and put the other into the store."""
    good = [
        _good(sample, form, http if number % 2 else s3)
        for number, (sample, form) in enumerate(zip(pictures.samples(), cycle(FORMATS), strict=False))
    ]
    return [*good, *_bad(http=http, s3=s3, internal_url=internal_url)]


def _good(sample: pictures.Sample, form: str, place: PictureServer | S3Server) -> Entry:
    with Image.open(sample.path) as image:
        data = FORMATS[form](image.convert("RGB"))
    name = f"{sample.file.removesuffix('.jpg')}.{form.rsplit(maxsplit=1)[-1].lower()}"
    if isinstance(place, S3Server):
        return Entry(place.put(name, data), form, label=sample.label)
    return Entry(place.serve(f"/{name}", Reply.picture(data)), form, label=sample.label)


def _bad(*, http: PictureServer, s3: S3Server, internal_url: str) -> list[Entry]:
    cut = s3.put("cut.jpg", pictures.truncated(pictures.picture()))
    return [
        Entry(cut, "cut off", code=ErrorCode.PICTURE_BROKEN),
        Entry(f"s3://{s3.bucket}/none.jpg", "no such key", code=ErrorCode.SOURCE_NOT_FOUND),
        Entry(http.url("/none.jpg"), "404", code=ErrorCode.SOURCE_NOT_FOUND),
        Entry(http.serve("/page.jpg", Reply.html()), "HTML", code=ErrorCode.NOT_A_PICTURE),
        # A service of this machine that no producer should reach through the worker.
        Entry(internal_url, "internal port", code=ErrorCode.SOURCE_FORBIDDEN),
    ]
