"""Bytes → RGB uint8 of the model's size.

The pixels are those of the checkpoint's own processor (Pillow's resize with its filter, its crop or squash), but for
what a moderator needs: EXIF orientation is applied, deep grey is scaled and not clipped, transparency is laid on white,
so that colours hidden under alpha 0 steer nothing, and of an animation the first frame is taken that can be seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.stages.decode.exif import exif_orientation
from shiwu_worker.stages.decode.flatten import flatten_to_rgb, sample_bits
from shiwu_worker.stages.decode.formats.webp_stream import webp_size
from shiwu_worker.stages.decode.image_errors import broken, require_memory, too_large, unsupported
from shiwu_worker.stages.decode.image_formats import identify, listed, refusal
from shiwu_worker.stages.decode.image_readers import OpenedImage, open_image
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.decode.resize import SIDEWAYS, model_pixels

DRAFT_FACTOR: Final = 2
"""A JPEG may be decoded at reduced size down to this many times the model's: below JPEG's own re-save noise."""
MIN_DRAFT: Final = 256
"""And never below this: a small model sees every level, and a small picture is cheap anyway."""
BYTES_A_PIXEL: Final = 16
"""Memory that a decoder may need. When it fails and so much cannot be had, it was short of memory."""
MAX_PARTS: Final = 20_000
"""Chunks of a PNG, segments of a JPEG. A PNG of 20 MiB in the smallest chunks that encoders write has 2,600."""
WARMED: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Judged by the header, before a pixel is decoded."""

    max_pixels: int
    max_side: int
    formats: tuple[str, ...]
    max_frames: int = 5000
    """Of one animation, where its header tells them; only the first few are ever decoded."""
    max_scans: int = 100


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
        Rejected: picture_empty, not_a_picture, picture_unsupported, picture_too_large, picture_broken or
            picture_invisible.
        MemoryError: it does not fit; perhaps beside its neighbours only.
    """
    name = _checked_format(data, limits)
    size = webp_size(data)
    if size:
        _check_size(*size, limits)
    opened = _opened(data, name, limits, size or (0, 0))
    with opened.image as image:
        _check_size(*image.size, limits)
        _check_frames(image, name, limits)
        size, extent = image.size, None
        pixels_told = image.width * image.height
        try:
            if name == "JPEG" and not exact:
                extent = _drafted(image, spec)
            rgb = flatten_to_rgb(
                image,
                load=opened.load,
                sample_bits=sample_bits(image),
                max_pixels=limits.max_pixels,
                check_size=lambda frame: _check_size(*frame.size, limits),
            )
            size = size if extent else rgb.size  # a frame of a GIF may be larger than its screen
            orientation = exif_orientation(opened.exif)
            if orientation in SIDEWAYS:
                size = size[1], size[0]
            pixels = model_pixels(rgb, spec, extent=extent or rgb.size, orientation=orientation, size=size, exact=exact)
        except (MemoryError, Rejected):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_many_pixels(error, limits) from error
        except Exception as error:  # border: a decoder raises anything on hostile bytes
            require_memory(BYTES_A_PIXEL * pixels_told)
            raise broken(f"expected a whole {name} image ({type(error).__name__}: {error!s:.120})") from error
    return pixels, DecodedInfo(name, *size, hashlib.sha256(data).hexdigest())


def _drafted(image: Image.Image, spec: ImageSpec) -> tuple[float, float] | None:
    """Have a large JPEG decoded at reduced size; where its content then ends, or None where the size stays."""
    edge = max(MIN_DRAFT, DRAFT_FACTOR * max(spec.width, spec.height, spec.shortest_edge or 0))
    drafted = image.draft("RGB", (edge, edge))
    return drafted[1][2:] if drafted else None


def warm() -> None:
    """Load every decoder, so that a process which may open no file later has them all. Starts no thread."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # many pictures are decoded side by side, and each thread's CPU is counted
    with contextlib.suppress(ImportError):
        import pillow_heif  # noqa: PLC0415 an extra that need not be there

        pillow_heif.register_heif_opener()
        pillow_heif.options.DECODE_THREADS = 1
    spec = ImageSpec(8, 8, "squash", None, Image.Resampling.BICUBIC, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for kind in WARMED:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, kind)
        decode(file.getvalue(), spec=spec, limits=DecodeLimits(max_pixels=256, max_side=16, formats=(kind,)))


def _checked_format(data: bytes, limits: DecodeLimits) -> str:
    """The format of these bytes; a Rejected for what is none, or is one that the operator does not accept."""
    if not data:
        raise Rejected(ErrorCode.PICTURE_EMPTY, "expected an image, got 0 bytes", stage=Stage.DECODE)
    found = identify(data)
    if found is None or not found.is_image:
        got = found.name if found else f"bytes that begin with {data[:12]!r}"
        text = f"expected {listed(limits.formats)}, got {got}"
        raise Rejected(ErrorCode.NOT_A_PICTURE, text, stage=Stage.DECODE)
    if found.name not in limits.formats:
        raise unsupported(refusal(found, limits.formats))
    return found.name


def _opened(data: bytes, name: str, limits: DecodeLimits, size: tuple[int, int]) -> OpenedImage:
    try:
        return open_image(data, name, max_parts=MAX_PARTS, max_scans=limits.max_scans)
    except (MemoryError, Rejected):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(error, limits) from error
    except Exception as error:  # border: a parser raises anything on hostile bytes
        require_memory(BYTES_A_PIXEL * size[0] * size[1])
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({type(error).__name__}: {error!s:.120})"
        raise broken(f"expected a whole {name} image, got one whose header cannot be read{reason}") from error


def _too_many_pixels(error: Exception, limits: DecodeLimits) -> Rejected:
    return too_large(f"expected at most {limits.max_pixels} pixels ({error!s:.120})")


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise too_large(
            f"expected at most {limits.max_pixels} pixels and {limits.max_side} a side, "
            f"got {width} × {height} = {width * height} pixels"
        )


def _check_frames(image: Image.Image, name: str, limits: DecodeLimits) -> None:
    """A GIF's frames are counted by reading all of it, and are not: none but the first are read."""
    if name in {"PNG", "WEBP", "AVIF"} and (frames := getattr(image, "n_frames", 1)) > limits.max_frames:
        raise too_large(f"expected at most {limits.max_frames} frames, got {frames}")
