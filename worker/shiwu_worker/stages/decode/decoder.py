"""Bytes → RGB pixels uint8 in the size of the model.

The pixels are those of the checkpoint's own image processor: Pillow's resize with its filter, its crop or squash. Four
things differ, because moderation needs them. EXIF orientation is applied. Grey of more than 8 bits is scaled and not
clipped. Transparent images are laid on white, so that colours hidden under alpha 0 have no influence. Of an animation
the first visible frame is used.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.exif import exif_orientation
from shiwu_worker.stages.decode.flatten import flatten_to_rgb, sample_bits
from shiwu_worker.stages.decode.formats.webp_stream import webp_size
from shiwu_worker.stages.decode.image_errors import broken, require_memory, too_large, unsupported
from shiwu_worker.stages.decode.image_formats import identify, listed, refusal
from shiwu_worker.stages.decode.image_readers import OpenedImage, open_image
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.decode.resize import SIDEWAYS, model_pixels

DRAFT_FACTOR: Final = 2
"""Least size, in sizes of the model, at which a large JPEG is decoded; the error is below JPEG's re-save noise."""
MIN_DRAFT: Final = 256
"""Least edge in pixels: a small model sees every level, and a small image is cheap anyway."""
DECODER_BYTES_PER_PIXEL: Final = 16
"""Memory that a decoder may need. If it fails and this much cannot be allocated, memory was short."""
MAX_PARTS: Final = 20_000
"""Chunks of a PNG, or segments of a JPEG. A PNG of 20 MiB in the smallest usual chunks has 2,600."""
_PIXELS: Final = re.compile(r"[0-9]+(?= pixels)")
WARM_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")


@dataclass(frozen=True, slots=True)
class DecodedInfo:
    """The image as its header describes it, upright."""

    format: str
    width: int
    height: int


def accepted_format(data: bytes, limits: DecodeLimits) -> str:
    """The format of a file by its first bytes; its header is not read.

    Raises:
        Rejected: picture_empty, not_a_picture, or picture_unsupported for a format that the operator does not accept.
    """
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


def decode(
    data: bytes, *, spec: ImageSpec, limits: DecodeLimits, is_exact: bool = False
) -> tuple[NDArray[np.uint8], DecodedInfo]:
    """Decode one image to uint8 (height, width, 3).

    Args:
        is_exact: never decode a JPEG at reduced size, and let Pillow resize; pixels are then within one level of
            the image processor of transformers.

    Raises:
        Rejected: picture_empty, not_a_picture, picture_unsupported, picture_too_large, picture_broken or
            picture_invisible.
        MemoryError: there is not enough memory, perhaps only because other images are decoded at the same time.
    """
    format_name = accepted_format(data, limits)
    canvas_size = webp_size(data)
    if canvas_size:
        _check_size(*canvas_size, limits)
    opened = _open(data, format_name, limits, canvas_size or (0, 0))
    with opened.image as image:
        _check_size(*image.size, limits)
        _check_frames(image, format_name, limits)
        size, extent = image.size, None
        header_pixels = image.width * image.height
        try:
            if format_name == "JPEG" and not is_exact:
                extent = _reduce_jpeg(image, spec)
            rgb = flatten_to_rgb(
                image,
                load=opened.load,
                sample_bits=sample_bits(image),
                max_pixels=limits.max_pixels,
                check_size=lambda frame: _check_size(*frame.size, limits),
            )
            rgb.load()  # of a damaged file some pixels may be missing even now, which Pillow tells when they are read
        except (MemoryError, Rejected):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_many_pixels(error, limits) from error
        except Exception as error:  # border: a decoder may raise any error on hostile bytes
            require_memory(DECODER_BYTES_PER_PIXEL * header_pixels)
            raise broken(f"expected a whole {format_name} image ({type(error).__name__}: {error!s:.120})") from error
        # All pixels are decoded now, so another error is a defect of the worker and says nothing about the image.
        size = size if extent else rgb.size  # a frame of a GIF may be larger than its screen
        orientation = exif_orientation(opened.exif)
        if orientation in SIDEWAYS:
            size = size[1], size[0]
        _check_size(*size, limits)
        pixels = model_pixels(
            rgb, spec, extent=extent or rgb.size, orientation=orientation, size=size, is_exact=is_exact
        )
    return pixels, DecodedInfo(format_name, *size)


def _reduce_jpeg(image: Image.Image, spec: ImageSpec) -> tuple[float, float] | None:
    """Let Pillow decode a large JPEG at reduced size; returns the extent of its content, or None for full size."""
    edge = max(MIN_DRAFT, DRAFT_FACTOR * max(spec.width, spec.height, spec.shortest_edge or 0))
    reduced = image.draft("RGB", (edge, edge))
    return reduced[1][2:] if reduced else None


def warm() -> None:
    """Load every decoder, because the sandbox may open no file later. Starts no thread."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded in parallel, and each thread's CPU is limited
    with contextlib.suppress(ImportError):
        import pillow_heif  # noqa: PLC0415 an optional dependency

        pillow_heif.register_heif_opener()
        pillow_heif.options.DECODE_THREADS = 1
    spec = ImageSpec(8, 8, "squash", None, Image.Resampling.BICUBIC, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for kind in WARM_FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, kind)
        decode(file.getvalue(), spec=spec, limits=DecodeLimits(max_pixels=256, max_side=16, formats=(kind,)))


def _open(data: bytes, name: str, limits: DecodeLimits, size: tuple[int, int]) -> OpenedImage:
    try:
        return open_image(data, name, max_parts=MAX_PARTS, max_scans=limits.max_scans)
    except (MemoryError, Rejected):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(error, limits) from error
    except Exception as error:  # border: a parser may raise any error on hostile bytes
        require_memory(DECODER_BYTES_PER_PIXEL * size[0] * size[1])
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({type(error).__name__}: {error!s:.120})"
        raise broken(f"expected a whole {name} image, got one whose header cannot be read{reason}") from error


def _too_many_pixels(error: Exception, limits: DecodeLimits) -> Rejected:
    # Pillow's own text names twice its limit, and advice of its own.
    found = _PIXELS.search(str(error))
    return too_large(
        f"expected at most {limits.max_pixels} pixels (SHIWU_MAX_PIXELS), got {found[0] if found else 'more'}"
    )


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise too_large(
            f"expected at most {limits.max_pixels} pixels (SHIWU_MAX_PIXELS) and {limits.max_side} a side "
            f"(SHIWU_MAX_SIDE), got {width} × {height} = {width * height} pixels"
        )


def _check_frames(image: Image.Image, name: str, limits: DecodeLimits) -> None:
    """Check the number of frames. A GIF is not checked: counting its frames would mean reading all of them."""
    if name in {"PNG", "WEBP", "AVIF"} and (frames := getattr(image, "n_frames", 1)) > limits.max_frames:
        raise too_large(f"expected at most {limits.max_frames} frames (SHIWU_MAX_FRAMES), got {frames}")
