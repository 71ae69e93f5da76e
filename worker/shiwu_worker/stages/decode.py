"""Bytes → RGB uint8 of the model's size.

The pixels are those of the checkpoint's own processor (Pillow's resize with its filter, its crop or squash), but for
three things a moderator needs: EXIF orientation is applied, 16-bit grey is scaled and not clipped, and transparency is
laid on white, so that colours hidden under alpha 0 steer nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.image_spec import ImageSpec

DRAFT_FACTOR: Final = 2
"""A JPEG may be decoded at reduced size down to this many times the model's: below JPEG's own re-save noise."""
LEAST_DRAFT: Final = 256
"""And never below this: a small model sees every level, and a small picture is cheap anyway."""
ORIENTATION: Final = 0x0112
_FAST_FILTERS: Final = {
    Image.Resampling.BOX: FilterType.box,
    Image.Resampling.BILINEAR: FilterType.bilinear,
    Image.Resampling.BICUBIC: FilterType.catmull_rom,  # Pillow's bicubic has a = -0.5, which is Catmull-Rom's
    Image.Resampling.LANCZOS: FilterType.lanczos3,
}
Shrink = Callable[[Image.Image, tuple[int, int], int], Image.Image]
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Judged by the header, before a pixel is decoded."""

    max_pixels: int
    max_side: int
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DecodedInfo:
    """The picture as its header describes it, upright."""

    format: str
    width: int
    height: int
    sha256: str


def decode(
    data: bytes, *, spec: ImageSpec, limits: DecodeLimits, exact: bool = False
) -> tuple[NDArray[np.uint8], DecodedInfo]:
    """Decode one picture to uint8 (height, width, 3).

    Args:
        exact: never decode a JPEG at reduced size, and let Pillow resize; pixels are then within one level of
            transformers' processor.

    Raises:
        Rejected: picture_empty, not_a_picture, picture_too_large or picture_broken.
        MemoryError: it does not fit; perhaps beside its neighbours only.
    """
    if not data:
        raise Rejected(ErrorCode.PICTURE_EMPTY, "expected a picture, got 0 bytes", stage=Stage.DECODE)
    with _open(data, limits) as image:
        name = "JPEG" if image.format == "MPO" else str(image.format)
        _check_size(image, limits)
        width, height = image.size
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
            sideways = orientation in {5, 6, 7, 8}
            if image.format in {"JPEG", "MPO"} and not exact:
                edge = max(LEAST_DRAFT, DRAFT_FACTOR * max(spec.width, spec.height, spec.shortest_edge or 0))
                image.draft("RGB", (edge, edge))
            shrink = _shrink if exact else _shrink_fast
            pixels = _resized(_rgb(image), spec, _TURNS.get(orientation), sideways=sideways, shrink=shrink)
        except MemoryError:
            raise
        except Exception as error:  # border: a decoder raises anything on hostile bytes
            if "out of memory" in str(error):  # Pillow's codecs say it with an OSError
                raise MemoryError(str(error)) from error
            text = f"expected a whole {name} picture ({type(error).__name__}: {error!s:.120})"
            raise Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE) from error
    if sideways:
        width, height = height, width
    return pixels, DecodedInfo(name, width, height, hashlib.sha256(data).hexdigest())


def _open(data: bytes, limits: DecodeLimits) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, str(error), stage=Stage.DECODE) from error
    except UnidentifiedImageError as error:
        text = f"expected {', '.join(limits.formats)}, got bytes that begin with {data[:12]!r}"
        raise Rejected(ErrorCode.NOT_A_PICTURE, text, stage=Stage.DECODE) from error
    except Exception as error:  # border: a parser raises anything on hostile bytes
        text = f"expected a picture's header ({type(error).__name__}: {error!s:.120})"
        raise Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE) from error


def _check_size(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        text = (
            f"expected at most {limits.max_pixels} pixels and {limits.max_side} a side, "
            f"got {width} × {height} = {width * height} pixels"
        )
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB without a copy where it is RGB already."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion clips everything above 255 to white.
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        solid = image.convert("RGBA")
        ground = Image.new("RGBA", solid.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, solid).convert("RGB")
    return image.convert("RGB")


def _shrink(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Pillow's own resize: the judge."""
    return image.resize(size, Image.Resampling(resample)) if image.size != size else image


def _shrink_fast(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The same kernels with SIMD, five to eight times as fast; on photographs a level beside Pillow's, five at most."""
    filter_ = _FAST_FILTERS.get(Image.Resampling(resample))
    if filter_ is None or image.size == size:
        return _shrink(image, size, resample)
    image.load()
    small = Image.new("RGB", size)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(filter_), use_alpha=False)
    Resizer().resize_pil(image, small, options)
    return small


def _resized(
    image: Image.Image, spec: ImageSpec, turn: Image.Transpose | None, *, sideways: bool, shrink: Shrink
) -> NDArray[np.uint8]:
    """Resize first and turn afterwards: the turn is then free, and a squash is the same either way."""
    if spec.resize == "squash":
        target = (spec.height, spec.width) if sideways else (spec.width, spec.height)
        small = shrink(image, target, spec.resample)
        upright = small if turn is None else small.transpose(turn)
        return np.asarray(upright, dtype=np.uint8)
    upright = image if turn is None else image.transpose(turn)
    edge = spec.shortest_edge or min(spec.width, spec.height)
    width, height = upright.size
    short, long = min(width, height), max(width, height)
    longer = int(edge * long / short)  # cut off, as transformers' get_resize_output_image_size does
    small = shrink(upright, (edge, longer) if width <= height else (longer, edge), spec.resample)
    top, left = (small.height - spec.height) // 2, (small.width - spec.width) // 2
    box = (left, top, left + spec.width, top + spec.height)
    if left < 0 or top < 0:
        return np.asarray(ImageOps.pad(small, (spec.width, spec.height)), dtype=np.uint8)
    return np.asarray(small.crop(box), dtype=np.uint8)
