"""Sample pictures with known labels, and every other kind of file made from them when asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageOps

FOLDER: Final = Path(__file__).parent / "samples"
EXIF_ORIENTATION: Final = 0x0112
TURNED_RIGHT: Final = 6
"""EXIF orientation of a picture that viewers turn clockwise by 90° before they show it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One shipped JPEG of 512 × 512 and what it shows."""

    file: str
    label: str
    category: str
    art: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return FOLDER / self.file

    @property
    def data(self) -> bytes:
        """The JPEG's bytes."""
        return self.path.read_bytes()


@lru_cache(maxsize=1)
def samples() -> tuple[Sample, ...]:
    """All samples, five of each category."""
    return tuple(Sample(**row) for row in json.loads((FOLDER / "samples.json").read_text(encoding="utf-8")))


def sample(label: str = "熊猫") -> Sample:
    """The sample that shows `label`."""
    return next(each for each in samples() if each.label == label)


def picture(label: str = "熊猫") -> Image.Image:
    """The sample that shows `label`, as RGB pixels."""
    with Image.open(sample(label).path) as image:
        return image.convert("RGB")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file of this Pillow format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_file(data: bytes) -> io.BytesIO:
    """The bytes as an open file."""
    return io.BytesIO(data)


def jpeg(image: Image.Image) -> bytes:
    """A baseline JPEG."""
    return saved(image, "JPEG", quality=92)


def progressive_jpeg(image: Image.Image) -> bytes:
    """A progressive JPEG, with about ten scans."""
    return saved(image, "JPEG", quality=92, progressive=True)


def cmyk_jpeg(image: Image.Image) -> bytes:
    """A JPEG in the colours of print."""
    return saved(image.convert("CMYK"), "JPEG", quality=92)


def turned_jpeg(image: Image.Image) -> bytes:
    """A JPEG whose pixels lie on their side and whose EXIF says so: viewers show it upright."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_RIGHT
    return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=92, exif=exif)


def large_jpeg(image: Image.Image) -> bytes:
    """A JPEG of 4000 × 3000, 12 megapixels, with the picture in its middle."""
    return saved(ImageOps.pad(image, (4000, 3000), color=image.getpixel((2, 2))), "JPEG", quality=88)  # type: ignore[arg-type]  # the stubs allow None


def png(image: Image.Image) -> bytes:
    """A PNG of 8 bits a channel."""
    return saved(image, "PNG", compress_level=1)


def rgba_png(image: Image.Image) -> bytes:
    """A PNG that is transparent outside a disk; under the transparency lies red, which must not be seen."""
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse((0, 0, image.width - 1, image.height - 1), fill=255)
    hidden = Image.composite(image, Image.new("RGB", image.size, (255, 0, 0)), mask)
    hidden.putalpha(mask)
    return saved(hidden, "PNG", compress_level=1)


def grey16_png(image: Image.Image) -> bytes:
    """A PNG of 16 bits of grey, where careless conversion makes everything white."""
    grey = image.convert("L")
    deep = Image.frombytes("I;16", grey.size, b"".join(bytes((value, value)) for value in grey.tobytes()))
    return saved(deep, "PNG")


def webp(image: Image.Image) -> bytes:
    """A lossy WebP."""
    return saved(image, "WEBP", quality=90)


def gif(image: Image.Image) -> bytes:
    """A GIF of one frame, 256 colours."""
    return saved(image.quantize(256), "GIF")


def avif(image: Image.Image) -> bytes:
    """An AVIF."""
    return saved(image, "AVIF", quality=80, speed=9)


def heic(image: Image.Image) -> bytes:
    """A HEIC, which operators must allow."""
    import pillow_heif  # noqa: PLC0415 few tests need it

    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", quality=80)


def truncated(image: Image.Image) -> bytes:
    """The first two thirds of a JPEG."""
    data = jpeg(image)
    return data[: len(data) * 2 // 3]


def empty(image: Image.Image) -> bytes:
    """No bytes at all."""
    return b""


def html(image: Image.Image) -> bytes:
    """A web page; serve it under a name that ends in .jpg."""
    return "<!doctype html><title>404</title><p>不是图片</p>".encode()


GOOD: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "plain.jpg": jpeg,
    "progressive.jpg": progressive_jpeg,
    "cmyk.jpg": cmyk_jpeg,
    "turned.jpg": turned_jpeg,
    "large.jpg": large_jpeg,
    "plain.png": png,
    "rgba.png": rgba_png,
    "grey16.png": grey16_png,
    "plain.webp": webp,
    "plain.gif": gif,
    "plain.avif": avif,
}
"""Files that decode: name → maker."""

BAD: Final[dict[str, Callable[[Image.Image], bytes]]] = {
    "truncated.jpg": truncated,
    "empty.jpg": empty,
    "html.jpg": html,
}
"""Files that don't: name → maker."""


def variants(label: str = "熊猫") -> dict[str, bytes]:
    """Every kind of good file of one sample: name → bytes."""
    image = picture(label)
    return {name: make(image) for name, make in GOOD.items()}
