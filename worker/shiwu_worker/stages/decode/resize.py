"""Resizes and crops a decoded image to the pixels that the model takes, as the checkpoint's own processor does.

Only the part of the image that the crop keeps is resized, so the size of the model bounds the cost, whatever the shape
of the image. An image that is stored sideways or mirrored is turned afterwards, when it is small.
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
_SIMD_FILTERS: Final = {
    Image.Resampling.BOX: FilterType.box,
    Image.Resampling.BILINEAR: FilterType.bilinear,
    Image.Resampling.BICUBIC: FilterType.catmull_rom,  # Pillow's bicubic has a = -0.5, which is Catmull-Rom's
    Image.Resampling.LANCZOS: FilterType.lanczos3,
}
_MAX_FILTER_RADIUS: Final = 3
"""Pixels on each side of its centre that the widest filter reads when it does not reduce the image."""
_FILTER_BYTES: Final = 2 << 20
_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_WHOLE_ASPECT: Final = 4
"""Up to this aspect ratio the exact path resizes the whole image and crops afterwards, bit by bit as the processor."""
MAX_ENDS_COMPARED: Final = 64
"""Positions at each end of a part that are compared; the one with the least rounding error in float32 is used."""
SIDEWAYS: Final = {5, 6, 7, 8}
"""Orientations whose width and height are exchanged when the image is turned upright."""
_MIRRORED_COLUMNS: Final = {2, 3, 7, 8}
"""Orientations in which the stored columns run against their axis in the upright image."""
_MIRRORED_ROWS: Final = {3, 4, 6, 7}
"""Orientations in which the stored rows run against their axis in the upright image."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of the resized image: which of its pixels the crop keeps, and how many black ones surround them."""

    resized: int
    first: int
    count: int
    padding: int

    @classmethod
    def cropped(cls, resized: int, wanted: int) -> _Axis:
        """The middle part, rounded as in transformers' `center_crop`, which surrounds a smaller image with black."""
        if resized < wanted:
            return cls(resized, 0, resized, math.ceil((wanted - resized) / 2))
        return cls(resized, (resized - wanted) // 2, wanted, 0)

    def part_of(self, extent: float, *, is_mirrored: bool) -> tuple[float, float]:
        """Begin and end of the kept pixels on an axis of the stored image that has this extent."""
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
    is_exact: bool,
) -> NDArray[np.uint8]:
    """The pixels of an RGB image that the model takes, (height, width, 3).

    Args:
        extent: width and height of the stored image in its own pixels; a JPEG that was decoded at reduced size ends
            within its last column and row.
        orientation: the EXIF orientation, 1 to 8.
        size: width and height of the upright image in full size, from which the processor derives the resized one.
        is_exact: resize with Pillow; otherwise with the same filters in SIMD instructions.
    """
    transpose = _TRANSPOSES.get(orientation)
    if is_exact and transpose is not None:
        # Pillow rounds between its pass over rows and its pass over columns, so the order of the passes matters.
        image, transpose = image.transpose(transpose), None
        extent = (extent[1], extent[0]) if orientation in SIDEWAYS else extent
        orientation = 1
    x, y = _axes(spec, *size)
    stored_x, stored_y = (y, x) if orientation in SIDEWAYS else (x, y)
    left, right = stored_x.part_of(extent[0], is_mirrored=orientation in _MIRRORED_COLUMNS)
    top, bottom = stored_y.part_of(extent[1], is_mirrored=orientation in _MIRRORED_ROWS)
    box, count = (left, top, right, bottom), (stored_x.count, stored_y.count)
    is_rows_first = _is_rows_first(size, (x.resized, y.resized))
    if not is_exact:
        is_rows_first = is_rows_first != (orientation in SIDEWAYS)
        small = resize_simd(image, count, box, spec.resample, is_rows_first=is_rows_first)
    elif max(x.resized, y.resized) <= MAX_WHOLE_ASPECT * min(x.resized, y.resized):
        whole = image.resize((x.resized, y.resized), Image.Resampling(spec.resample))
        small = whole.crop((x.first, y.first, x.first + x.count, y.first + y.count))
    else:
        small = resize_part(image, x, y, spec.resample, is_rows_first=is_rows_first)
    upright = np.asarray(small if transpose is None else small.transpose(transpose), dtype=np.uint8)
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
    """Whether Pillow would resize the height first, because it is reduced much more than the width."""
    less_rows, less_columns = size[1] - resized[1], size[0] - resized[0]
    return less_rows > 0 and less_rows > 2 * less_columns


def resize_part(image: Image.Image, x: _Axis, y: _Axis, resample: int, *, is_rows_first: bool) -> Image.Image:
    """Resize a part of an image to the pixels that Pillow gives for the whole image.

    Args:
        is_rows_first: whether Pillow would resize the height of the whole image before its width. It rounds between
            the two passes.
    """
    filter_ = Image.Resampling(resample)
    columns, rows = _Window.around(x, image.width), _Window.around(y, image.height)
    part = image.crop((columns.begin, rows.begin, columns.end, rows.end))
    for is_row_pass in (is_rows_first, not is_rows_first):
        if is_row_pass:
            part = part.resize((part.width, rows.count), filter_, box=(0, rows.start, part.width, rows.stop))
        else:
            part = part.resize((columns.count, part.height), filter_, box=(columns.start, 0, columns.stop, part.height))
    return part.crop((columns.before, rows.before, columns.before + x.count, rows.before + y.count))


@dataclass(frozen=True, slots=True)
class _Window:
    """The pixels of one axis that are resized to get some pixels of the result."""

    begin: int
    end: int
    """Pixels of the image that the filter reads."""
    start: float
    stop: float
    """The range that is resized, counted from `begin`."""
    count: int
    """Number of pixels that the range becomes."""
    before: int
    """How many of these come before the wanted ones."""

    @classmethod
    def around(cls, axis: _Axis, length: int) -> _Window:
        """The wanted pixels of an axis of this length, with some around them.

        Pillow keeps the ends of a resized range in single precision, so ends with a small rounding error are chosen.
        """
        scale = length / axis.resized
        margin = math.ceil(_MAX_FILTER_RADIUS * max(1.0, scale)) + 1

        def rounding_error(pixel: int, begin: int) -> float:
            position = pixel * scale - begin
            return abs(float(np.float32(position)) - position)

        def begin_of(pixel: int) -> int:
            return max(0, math.floor(pixel * scale) - margin)

        first = min(
            range(axis.first, max(-1, axis.first - MAX_ENDS_COMPARED), -1),
            key=lambda pixel: rounding_error(pixel, begin_of(pixel)),
        )
        begin, last = begin_of(first), axis.first + axis.count
        past = min(
            range(last, min(axis.resized + 1, last + MAX_ENDS_COMPARED)), key=lambda pixel: rounding_error(pixel, begin)
        )
        end = min(length, math.ceil(past * scale) + margin)
        return cls(begin, end, first * scale - begin, past * scale - begin, past - first, axis.first - first)


def resize_simd(
    image: Image.Image, size: tuple[int, int], box: Box, resample: int, *, is_rows_first: bool = False
) -> Image.Image:
    """Resize with the same filters in SIMD instructions, three to eight times as fast as Pillow.

    On photographs most values are those of Pillow, and none is off by more than one level. For that the axes are
    resized in Pillow's order, because values are rounded and cut off between the two passes. One call of
    fast_image_resize 6.1 for both axes always resizes the height first. For some boxes it also reads outside the image,
    because it begins the second pass at the window of the first pixel, and that of the second pixel may begin earlier.

    Args:
        is_rows_first: whether Pillow would resize the height of the stored image before its width.
    """
    filter_ = _SIMD_FILTERS.get(Image.Resampling(resample))
    if size == image.size and box == (0.0, 0.0, float(image.width), float(image.height)):
        return image
    if filter_ is None:
        return image.resize(size, Image.Resampling(resample), box=box)
    image.load()
    left, top, right, bottom = box[0], box[1], min(box[2], image.width), min(box[3], image.height)
    if is_rows_first:
        first, last = _filter_window(left, right, size[0], image.width)
        low = _resize_simd_pass(image, (last - first, size[1]), (first, top, last, bottom), filter_)
        return _resize_simd_pass(low, size, (left - first, 0, right - first, size[1]), filter_)
    first, last = _filter_window(top, bottom, size[1], image.height)
    narrow = _resize_simd_pass(image, (size[0], last - first), (left, first, right, last), filter_)
    return _resize_simd_pass(narrow, size, (0, top - first, size[0], bottom - first), filter_)


def _filter_window(start: float, stop: float, count: int, length: int) -> tuple[int, int]:
    """Begin and end of the pixels that the filter reads to resize this range of an axis to `count` pixels."""
    margin = math.ceil(_MAX_FILTER_RADIUS * max(1.0, (stop - start) / count)) + 1
    return max(0, math.floor(start) - margin), min(length, math.ceil(stop) + margin)


def _resize_simd_pass(image: Image.Image, size: tuple[int, int], box: Box, filter_: FilterType) -> Image.Image:
    left, top, right, bottom = box
    # Without memory for its filter and intermediate rows the resizer aborts the process, so the memory is checked.
    require_memory(_FILTER_BYTES + 4 * max(size[0] * image.height, image.width * size[1]))
    small = Image.new("RGB", size, None)  # not filled, because every pixel is written
    options = ResizeOptions(
        resize_alg=ResizeAlg.convolution(filter_),
        use_alpha=False,
        crop_box=CropBox(left, top, right - left, bottom - top),
    )
    Resizer().resize_pil(image, small, options)
    return small
