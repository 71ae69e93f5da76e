"""Bytes → RGB uint8 of the model's size.

The pixels are those of the checkpoint's own processor (Pillow's resize with its filter, its crop or squash), but for
what a moderator needs: EXIF orientation is applied, deep grey is scaled and not clipped, transparency is laid on white,
so that colours hidden under alpha 0 steer nothing, and of an animation the first frame is taken that can be seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageOps, UnidentifiedImageError

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.headers import has_more_chunks, has_more_scans, webp_size
from shiwu_worker.image_formats import identify, listed, refusal
from shiwu_worker.image_spec import ImageSpec
from shiwu_worker.pixels import sample_bits, visible_rgb

DRAFT_FACTOR: Final = 2
"""A JPEG may be decoded at reduced size down to this many times the model's: below JPEG's own re-save noise."""
LEAST_DRAFT: Final = 256
"""And never below this: a small model sees every level, and a small picture is cheap anyway."""
ORIENTATION: Final = 0x0112
MAX_CHUNKS: Final = 20_000
"""Chunks of a PNG, segments of a JPEG. A PNG of 20 MiB in the smallest chunks that encoders write has 2,600."""
WARMED: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
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
    if size := webp_size(data):
        _check_size(*size, limits)
    if has_more_chunks(data, MAX_CHUNKS):
        text = f"expected a PNG or JPEG of at most {MAX_CHUNKS} chunks, got more"
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)
    with _open(data, name, limits) as image:
        _check_size(*image.size, limits)
        _check_parts(image, data, limits)
        width, height = image.size
        try:
            bits = sample_bits(image)  # before EXIF: a PNG is loaded to look for it
            orientation = image.getexif().get(ORIENTATION, 1)
            sideways = orientation in {5, 6, 7, 8}
            if image.format in {"JPEG", "MPO"} and not exact:
                edge = max(LEAST_DRAFT, DRAFT_FACTOR * max(spec.width, spec.height, spec.shortest_edge or 0))
                image.draft("RGB", (edge, edge))
            shrink = _shrink if exact else _shrink_fast
            rgb = visible_rgb(
                image,
                sample_bits=bits,
                max_pixels=limits.max_pixels,
                check_size=lambda frame: _check_size(*frame.size, limits),
            )
            pixels = _resized(rgb, spec, _TURNS.get(orientation), sideways=sideways, shrink=shrink)
        except (MemoryError, Rejected):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(error, limits) from error
        except Exception as error:  # border: a decoder raises anything on hostile bytes
            if "out of memory" in str(error):  # Pillow's codecs say it with an OSError
                raise MemoryError(str(error)) from error
            text = f"expected a whole {name} picture ({type(error).__name__}: {error!s:.120})"
            raise Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE) from error
    if sideways:
        width, height = height, width
    return pixels, DecodedInfo(name, width, height, hashlib.sha256(data).hexdigest())


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
        raise Rejected(ErrorCode.PICTURE_UNSUPPORTED, refusal(found, limits.formats), stage=Stage.DECODE)
    return found.name


def _open(data: bytes, name: str, limits: DecodeLimits) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=(name,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(error, limits) from error
    except Exception as error:  # border: a parser raises anything on hostile bytes
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({type(error).__name__}: {error!s:.120})"
        text = f"expected a whole {name} image, got one whose header cannot be read{reason}"
        raise Rejected(ErrorCode.PICTURE_BROKEN, text, stage=Stage.DECODE) from error


def _too_large(error: Exception, limits: DecodeLimits) -> Rejected:
    text = f"expected at most {limits.max_pixels} pixels ({error!s:.120})"
    return Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        text = (
            f"expected at most {limits.max_pixels} pixels and {limits.max_side} a side, "
            f"got {width} × {height} = {width * height} pixels"
        )
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


def _check_parts(image: Image.Image, data: bytes, limits: DecodeLimits) -> None:
    """Frames and scans. A GIF's frames are counted by reading all of it, and are not: none but the first are read."""
    if image.format in {"JPEG", "MPO"} and has_more_scans(data, limits.max_scans):
        text = f"expected a JPEG of at most {limits.max_scans} scans, got more"
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)
    if image.format in {"PNG", "WEBP", "AVIF"} and (frames := getattr(image, "n_frames", 1)) > limits.max_frames:
        text = f"expected at most {limits.max_frames} frames, got {frames}"
        raise Rejected(ErrorCode.PICTURE_TOO_LARGE, text, stage=Stage.DECODE)


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
