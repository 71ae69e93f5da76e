"""Any of Pillow's modes → RGB as a viewer shows it on a white page, and which frame of an animation that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected

FRAMES_TRIED: Final = 16
"""How many frames at the beginning of an animation are looked at; those behind them are never decoded."""
MIN_MS: Final = 20
"""A frame that is shown for less is over before anybody has seen it."""
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
    """The picture as RGB; of an animation the first frame that is not wholly transparent and lasts.

    Where no frame lasts it is the first one with something on it. An APNG's default picture, which is not part of its
    animation, is not what browsers show. At most twice `max_pixels` are decoded.

    Args:
        load: decodes the current frame.
        sample_bits: what `sample_bits` said before anything was loaded.

    Raises:
        Rejected: picture_invisible, when every pixel of every frame that was tried is transparent.
        Exception: what `load` raises, and what `check_size` does: a frame may be larger than the header said.
    """
    if image.format not in ANIMATED or not getattr(image, "is_animated", False):
        rgb, is_visible = flat(image, sample_bits, load)
        if not is_visible:
            raise _invisible("an image in which every pixel is transparent")
        return rgb
    begin = 1 if getattr(image, "default_image", False) else 0
    tries = max(1, min(FRAMES_TRIED, 2 * max_pixels // (image.width * image.height)))
    seen: Image.Image | None = None
    tried = 0
    for number in range(begin, begin + tries):
        try:
            image.seek(number)
        except EOFError:
            break
        check_size(image)
        rgb, is_visible = flat(image, sample_bits, load)
        tried += 1
        if is_visible and shown_ms(image) >= MIN_MS:
            return rgb
        if is_visible and seen is None:
            seen = rgb.copy() if rgb is image else rgb  # the next frame is drawn over this one
    if seen is None:
        raise _invisible(f"an animation in whose first {tried} frames every pixel is transparent")
    return seen


def shown_ms(image: Image.Image) -> float:
    """How long browsers show the current frame: they take a delay of 10 ms or less, or none, for 100 ms."""
    delay_ms = float(image.info.get("duration", 0))
    return delay_ms if delay_ms > SHORT_DELAY_MS else BROWSER_DELAY_MS


def _invisible(got: str) -> Rejected:
    text = f"expected an image in which something can be seen, got {got}"
    return Rejected(ErrorCode.PICTURE_INVISIBLE, text, stage=Stage.DECODE)


def flat(
    image: Image.Image, bits: int, load: Callable[[Image.Image], object] = Image.Image.load
) -> tuple[Image.Image, bool]:
    """The current frame as RGB, without a copy where it is that already, and whether there is anything on it."""
    uncovered = _uncovered(image)
    load(image)
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image)
    if image.mode == "LAB":
        raise ValueError("expected grey, a palette, RGB or CMYK, got LAB")
    if uncovered is None and image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB"), True
    if image.mode == "La":
        image = image.convert("LA")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        # Many programs leave the fourth byte of a 32-bit BMP at 0; viewers show such a file as opaque.
        return image.convert("RGB"), True
    transparent = image.info.get("transparency")
    if bits > 8 and isinstance(transparent, tuple):
        # Pillow has reduced the pixels to 8 bits, and left this as it was.
        image.info["transparency"] = tuple(value >> (bits - 8) for value in transparent)
    solid = image.convert("RGBA")
    if uncovered is not None:
        kept = solid.crop(uncovered)
        solid = Image.new("RGBA", solid.size, (0, 0, 0, 0))
        solid.paste(kept, uncovered[:2])
    return _on_ground(solid)


def _on_ground(solid: Image.Image) -> tuple[Image.Image, bool]:
    least, most = solid.getchannel("A").getextrema()
    if least == _OPAQUE:
        return solid.convert("RGB"), True
    on_white = _composite(solid, 255)
    vanishes = all(band[0] >= _ALMOST_WHITE for band in on_white.getextrema())  # type: ignore[index]  # RGB has bands
    # White on nothing is seen by whoever looks at it on a dark page.
    return (_composite(solid, 0) if vanishes and most else on_white), bool(most)


def _composite(solid: Image.Image, grey: int) -> Image.Image:
    ground = Image.new("RGBA", solid.size, (grey, grey, grey, 255))
    return Image.alpha_composite(ground, solid).convert("RGB")


def _uncovered(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The part that a GIF's first frame draws, where it is not all: what is around it shows the page behind."""
    tiles = getattr(image, "tile", [])
    if image.format != "GIF" or image.tell() != 0 or not tiles:
        return None
    left, top, right, bottom = tiles[0][1]
    return None if (left, top, right, bottom) == (0, 0, *image.size) else (left, top, right, bottom)


def sample_bits(image: Image.Image) -> int:
    """16 where the file has 16 bits a channel, else 8; known until the pixels are loaded."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else None
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return 16 if isinstance(rawmode, str) and ";16" in rawmode else 8


def _from_deep_grey(image: Image.Image) -> tuple[Image.Image, bool]:
    """16 or 32 bits of grey, or floats, as RGB, and whether anything is visible.

    Pillow's own conversion clips everything above 255 to white.
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
