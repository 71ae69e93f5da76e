"""Flattens any of Pillow's modes to RGB as a viewer shows it on a white page, and chooses the frame of an animation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected

MAX_FRAMES_DECODED: Final = 16
"""Frames at the beginning of an animation that may be decoded; later ones never are."""
MIN_VISIBLE_MS: Final = 20
"""A frame that is shown for less time is too short to be seen."""
SHORT_DELAY_MS: Final = 10
"""Browsers show a frame with a delay of 0 to 10 ms for `BROWSER_DELAY_MS`."""
BROWSER_DELAY_MS: Final = 100
ANIMATED: Final = {"GIF", "PNG", "WEBP", "AVIF"}
_ALMOST_WHITE: Final = 250
_ALPHA_MODES: Final = {"RGBA", "LA", "PA", "La", "RGBa"}
_OPAQUE: Final = 255


def flatten_to_rgb(
    image: Image.Image,
    *,
    load: Callable[[Image.Image], object],
    sample_bits: int,
    max_pixels: int,
    check_size: Callable[[Image.Image], None],
) -> Image.Image:
    """The image as RGB; of an animation, the first visible frame that is shown long enough to be seen.

    If no frame is shown long enough, it is the first visible one. The default image of an APNG is skipped if it is not
    part of the animation, because browsers do not show it. At most twice `max_pixels` are decoded.

    Args:
        load: decodes the current frame.
        sample_bits: the result of `sample_bits` before anything was loaded.

    Raises:
        Rejected: picture_invisible, when every pixel of every decoded frame is transparent.
        Exception: whatever `load` and `check_size` raise; a frame may be larger than the header says.
    """
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        max_frames = max(1, min(MAX_FRAMES_DECODED, 2 * max_pixels // (image.width * image.height)))
        return _visible_frame(image, load, sample_bits, check_size, max_frames=max_frames)
    rgb, is_visible = flatten_frame(image, sample_bits, load)
    if not is_visible:
        raise _invisible("an image in which every pixel is transparent")
    return rgb


def _visible_frame(
    image: Image.Image,
    load: Callable[[Image.Image], object],
    sample_bits: int,
    check_size: Callable[[Image.Image], None],
    *,
    max_frames: int,
) -> Image.Image:
    first = 1 if getattr(image, "default_image", False) else 0
    short_frame: Image.Image | None = None
    decoded = 0
    for number in range(first, first + max_frames):
        try:
            image.seek(number)
        except EOFError:
            break
        check_size(image)
        rgb, is_visible = flatten_frame(image, sample_bits, load)
        decoded += 1
        if is_visible and shown_ms(image) >= MIN_VISIBLE_MS:
            return rgb
        if is_visible and short_frame is None:
            short_frame = rgb.copy() if rgb is image else rgb  # the next frame is drawn over this one
    if short_frame is None:
        raise _invisible(f"an animation in whose first {decoded} frames every pixel is transparent")
    return short_frame


def shown_ms(image: Image.Image) -> float:
    """How long browsers show the current frame: they use 100 ms for a delay of 10 ms or less, or none."""
    delay_ms = float(image.info.get("duration", 0))
    return delay_ms if delay_ms > SHORT_DELAY_MS else BROWSER_DELAY_MS


def _invisible(got: str) -> Rejected:
    text = f"expected an image in which something can be seen, got {got}"
    return Rejected(ErrorCode.PICTURE_INVISIBLE, text, stage=Stage.DECODE)


def flatten_frame(
    image: Image.Image, bits: int, load: Callable[[Image.Image], object] = Image.Image.load
) -> tuple[Image.Image, bool]:
    """The current frame as RGB, and whether anything is visible; not a copy if the frame is RGB already."""
    drawn_box = _partial_gif_frame(image)
    load(image)
    if image.mode.startswith(("I", "F")):
        return _flatten_deep_grey(image)
    if image.mode == "LAB":
        raise ValueError("expected grey, a palette, RGB or CMYK, got LAB")
    if drawn_box is None and image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB"), True
    if image.mode == "La":
        image = image.convert("LA")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        # Many programs write 0 into the fourth byte of a 32-bit BMP; viewers show such a file as opaque.
        return image.convert("RGB"), True
    transparent = image.info.get("transparency")
    if bits > 8 and isinstance(transparent, tuple):
        # Pillow has reduced the pixels to 8 bits, but not this colour.
        image.info["transparency"] = tuple(value >> (bits - 8) for value in transparent)
    rgba = image.convert("RGBA")
    if drawn_box is not None:
        drawn = rgba.crop(drawn_box)
        rgba = Image.new("RGBA", rgba.size, (0, 0, 0, 0))
        rgba.paste(drawn, drawn_box[:2])
    return _flatten_alpha(rgba)


def _flatten_alpha(rgba: Image.Image) -> tuple[Image.Image, bool]:
    """The image on a white page, or on a black one if it is white itself; and whether anything is visible."""
    min_alpha, max_alpha = rgba.getchannel("A").getextrema()
    if min_alpha == _OPAQUE:
        return rgba.convert("RGB"), True
    on_white = _composite(rgba, 255)
    is_all_white = all(band[0] >= _ALMOST_WHITE for band in on_white.getextrema())  # type: ignore[index]  # RGB has bands
    # A white drawing on a transparent background is visible on a dark page only.
    return (_composite(rgba, 0) if is_all_white and max_alpha else on_white), bool(max_alpha)


def _composite(rgba: Image.Image, grey: int) -> Image.Image:
    background = Image.new("RGBA", rgba.size, (grey, grey, grey, 255))
    return Image.alpha_composite(background, rgba).convert("RGB")


def _partial_gif_frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box that a GIF's first frame draws, or None if it draws all; around it the page is visible."""
    tiles = getattr(image, "tile", [])
    if image.format != "GIF" or image.tell() != 0 or not tiles:
        return None
    left, top, right, bottom = tiles[0][1]
    return None if (left, top, right, bottom) == (0, 0, *image.size) else (left, top, right, bottom)


def sample_bits(image: Image.Image) -> int:
    """16 if the file has 16 bits per channel, otherwise 8. Call it before the pixels are loaded."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else None
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return 16 if isinstance(rawmode, str) and ";16" in rawmode else 8


def _flatten_deep_grey(image: Image.Image) -> tuple[Image.Image, bool]:
    """Grey of 16 or 32 bits, or of floats, as RGB; and whether anything is visible.

    Pillow's own conversion would clip everything above 255 to white.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        top = float(values.max())
        grey = (values.clip(0, None) * (255 / (1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0))).clip(0, 255)
    elif values.dtype.itemsize == 2:
        grey = values >> 8
    else:
        grey = values.clip(0, None) >> (8 if values.max() < 1 << 16 else 23)
    grey = grey.astype(np.uint8)
    transparent = image.info.get("transparency")
    is_visible = True
    if isinstance(transparent, int):
        hidden = values == transparent
        grey[hidden] = 255
        is_visible = not bool(hidden.all())
    return Image.fromarray(grey).convert("RGB"), is_visible
