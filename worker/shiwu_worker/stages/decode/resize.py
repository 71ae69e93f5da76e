"""Resizes and crops a decoded image to the pixels that the model takes, as the checkpoint's own processor does.

Only the part of the image that the crop keeps is resized, so the cost is bounded by the model's size and not by the
shape of the image. An image that is stored sideways or mirrored is turned afterwards, when it is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import Image

from shiwu_worker.stages.decode.image_errors import require_memory
from shiwu_worker.stages.decode.image_spec import ImageSpec

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the stored image."""
_FAST_FILTERS: Final = {
    Image.Resampling.BOX: FilterType.box,
    Image.Resampling.BILINEAR: FilterType.bilinear,
    Image.Resampling.BICUBIC: FilterType.catmull_rom,  # Pillow's bicubic has a = -0.5, which is Catmull-Rom's
    Image.Resampling.LANCZOS: FilterType.lanczos3,
}
_WIDEST_FILTER: Final = 3
"""Pixels on each side of its centre that the widest filter reaches when it does not shrink."""
_FILTER_BYTES: Final = 2 << 20
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_WHOLE_ASPECT: Final = 4
"""Up to this aspect ratio the exact path resizes all of the image and crops afterwards: the processor's very bits."""
ENDS_TRIED: Final = 64
"""Places at each end of a part among which the one is taken that single precision can say best."""
SIDEWAYS: Final = {5, 6, 7, 8}
"""Orientations whose width and height change places when the image is turned upright."""
_MIRRORED_X: Final = {2, 3, 7, 8}
"""Orientations in which the stored columns run against the axis of the upright image that they become."""
_MIRRORED_Y: Final = {3, 4, 6, 7}
"""The same for the stored rows."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of the resized image: which of its pixels are kept, and how many black ones surround them."""

    resized: int
    first: int
    count: int
    padding: int

    @classmethod
    def cropped(cls, resized: int, wanted: int) -> _Axis:
        """The middle, by the rounding of transformers' `center_crop`, which surrounds a smaller image with black."""
        if resized < wanted:
            return cls(resized, 0, resized, math.ceil((wanted - resized) / 2))
        return cls(resized, (resized - wanted) // 2, wanted, 0)

    def part_of(self, extent: float, *, is_mirrored: bool) -> tuple[float, float]:
        """Where the kept pixels lie on an axis of the stored image that has this extent."""
        first = self.resized - self.first - self.count if is_mirrored else self.first
        scale = extent / self.resized
        return first * scale, min((first + self.count) * scale, extent)


def model_pixels(
    image: Image.Image,
    spec: ImageSpec,
    *,
    extent: tuple[float, float],
    orientation: int,
    size: tuple[int, int],
    exact: bool,
) -> NDArray[np.uint8]:
    """The pixels of an RGB image that the model takes, (height, width, 3).

    Args:
        extent: width and height of the stored image in its own pixels; a JPEG that was decoded at reduced size ends
            within its last column and row.
        orientation: as EXIF numbers it: how the stored image has to be turned.
        size: width and height of the upright image in full size, from which the processor derives the resized one.
        exact: let Pillow resize; otherwise the same filters with SIMD.
    """
    turn = _TURNS.get(orientation)
    if exact and turn is not None:
        # Pillow rounds between its pass over rows and its pass over columns, so the order of the passes is seen.
        image, turn = image.transpose(turn), None
        extent = (extent[1], extent[0]) if orientation in SIDEWAYS else extent
        orientation = 1
    x, y = _axes(spec, *size)
    stored_x, stored_y = (y, x) if orientation in SIDEWAYS else (x, y)
    left, right = stored_x.part_of(extent[0], is_mirrored=orientation in _MIRRORED_X)
    top, bottom = stored_y.part_of(extent[1], is_mirrored=orientation in _MIRRORED_Y)
    box, count = (left, top, right, bottom), (stored_x.count, stored_y.count)
    if not exact:
        small = resize_fast(image, count, box, spec.resample)
    elif max(x.resized, y.resized) <= MAX_WHOLE_ASPECT * min(x.resized, y.resized):
        whole = image.resize((x.resized, y.resized), Image.Resampling(spec.resample))
        small = whole.crop((x.first, y.first, x.first + x.count, y.first + y.count))
    else:
        is_rows_first = _is_rows_first(size, (x.resized, y.resized))
        small = resize_part(image, x, y, spec.resample, is_rows_first=is_rows_first)
    upright = np.asarray(small if turn is None else small.transpose(turn), dtype=np.uint8)
    if upright.shape[:2] == (spec.height, spec.width):
        return upright
    pixels = np.zeros((spec.height, spec.width, 3), np.uint8)
    pixels[y.padding : y.padding + y.count, x.padding : x.padding + x.count] = upright
    return pixels


def _axes(spec: ImageSpec, width: int, height: int) -> tuple[_Axis, _Axis]:
    if spec.resize == "squash":
        return _Axis(spec.width, 0, spec.width, 0), _Axis(spec.height, 0, spec.height, 0)
    edge = spec.shortest_edge or min(spec.width, spec.height)
    short, long = min(width, height), max(width, height)
    longer = int(edge * long / short)  # rounded down, as transformers' get_resize_output_image_size does
    resized = (edge, longer) if width <= height else (longer, edge)
    return _Axis.cropped(resized[0], spec.width), _Axis.cropped(resized[1], spec.height)


def _is_rows_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow would resize the height first: where it shrinks much more than the width."""
    less_rows, less_columns = size[1] - resized[1], size[0] - resized[0]
    return less_rows > 0 and less_rows > 2 * less_columns


def resize_part(image: Image.Image, x: _Axis, y: _Axis, resample: int, *, is_rows_first: bool) -> Image.Image:
    """A part of an image as Pillow resizes it within the whole.

    Args:
        is_rows_first: whether Pillow would resize the height of the whole image before its width. It rounds between
            the two passes.
    """
    filter_ = Image.Resampling(resample)
    columns, rows = _Stretch.around(x, image.width), _Stretch.around(y, image.height)
    part = image.crop((columns.begin, rows.begin, columns.end, rows.end))
    for is_row_pass in (is_rows_first, not is_rows_first):
        if is_row_pass:
            part = part.resize((part.width, rows.count), filter_, box=(0, rows.start, part.width, rows.stop))
        else:
            part = part.resize((columns.count, part.height), filter_, box=(columns.start, 0, columns.stop, part.height))
    return part.crop((columns.before, rows.before, columns.before + x.count, rows.before + y.count))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What has to be resized of one axis for some pixels of the result."""

    begin: int
    end: int
    """Pixels of the image that the filter needs."""
    start: float
    stop: float
    """The stretch that is resized, counted from `begin`."""
    count: int
    """Pixels that it becomes."""
    before: int
    """Of these, how many come before the wanted ones."""

    @classmethod
    def around(cls, axis: _Axis, length: int) -> _Stretch:
        """The wanted pixels of an axis of this length, with some around them.

        Pillow keeps the ends of what it resizes in single precision. Ends are sought that lose little by that.
        """
        scale = length / axis.resized
        margin = math.ceil(_WIDEST_FILTER * max(1.0, scale)) + 1

        def lost(pixel: int, begin: int) -> float:
            placement = pixel * scale - begin
            return abs(float(np.float32(placement)) - placement)

        def begin_of(pixel: int) -> int:
            return max(0, math.floor(pixel * scale) - margin)

        first = min(range(axis.first, max(-1, axis.first - ENDS_TRIED), -1), key=lambda one: lost(one, begin_of(one)))
        begin, last = begin_of(first), axis.first + axis.count
        past = min(range(last, min(axis.resized + 1, last + ENDS_TRIED)), key=lambda one: lost(one, begin))
        end = min(length, math.ceil(past * scale) + margin)
        return cls(begin, end, first * scale - begin, past * scale - begin, past - first, axis.first - first)


def resize_fast(image: Image.Image, size: tuple[int, int], box: Box, resample: int) -> Image.Image:
    """The same filters with SIMD, five to eight times as fast; on photographs mostly within one level, at most five."""
    left, top, right, bottom = box
    filter_ = _FAST_FILTERS.get(Image.Resampling(resample))
    if size == image.size and box == (0.0, 0.0, float(image.width), float(image.height)):
        return image
    if filter_ is None:
        return image.resize(size, Image.Resampling(resample), box=box)
    image.load()
    box = (left, top, min(right, image.width), min(bottom, image.height))
    if left == 0 and top == 0:
        return _resize_fast_pass(image, size, box, filter_)
    return _resize_fast_in_two_passes(image, size, box, filter_)


def _resize_fast_in_two_passes(image: Image.Image, size: tuple[int, int], box: Box, filter_: FilterType) -> Image.Image:
    """Resize one axis and then the other, the one first that leaves fewer pixels.

    fast_image_resize 6.1 reads outside the image for some boxes where it resizes both axes in one call: it begins the
    second pass at the first pixel's window, and the window of the second pixel may begin one pixel earlier.
    """
    left, top, right, bottom = box
    first_column, last_column = _window(left, right, size[0], image.width)
    first_row, last_row = _window(top, bottom, size[1], image.height)
    if size[0] * (last_row - first_row) <= size[1] * (last_column - first_column):
        rows = (size[0], last_row - first_row)
        narrow = _resize_fast_pass(image, rows, (left, first_row, right, last_row), filter_)
        return _resize_fast_pass(narrow, size, (0, top - first_row, size[0], bottom - first_row), filter_)
    columns = (last_column - first_column, size[1])
    low = _resize_fast_pass(image, columns, (first_column, top, last_column, bottom), filter_)
    return _resize_fast_pass(low, size, (left - first_column, 0, right - first_column, size[1]), filter_)


def _window(start: float, stop: float, count: int, length: int) -> tuple[int, int]:
    """Pixels of an axis that the filter needs to resize a stretch of it to `count` pixels."""
    margin = math.ceil(_WIDEST_FILTER * max(1.0, (stop - start) / count)) + 1
    return max(0, math.floor(start) - margin), min(length, math.ceil(stop) + margin)


def _resize_fast_pass(image: Image.Image, size: tuple[int, int], box: Box, filter_: FilterType) -> Image.Image:
    left, top, right, bottom = box
    # The resizer ends the process when it gets no memory for its filter and for what lies between its passes.
    require_memory(_FILTER_BYTES + 4 * max(size[0] * image.height, image.width * size[1]))
    small = Image.new("RGB", size)
    options = ResizeOptions(
        resize_alg=ResizeAlg.convolution(filter_),
        use_alpha=False,
        crop_box=CropBox(left, top, right - left, bottom - top),
    )
    Resizer().resize_pil(image, small, options)
    return small
