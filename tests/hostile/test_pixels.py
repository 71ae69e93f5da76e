"""What a moderator must see of images that were made to show a machine something else."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.flatten import flatten_frame
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support import pictures
from tests.support.bombs import png_chunk, raw_png

SPEC: Final = ImageSpec(32, 32, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
LIMITS: Final = DecodeLimits(max_pixels=1_000_000, max_side=16_384, formats=FORMATS)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def shown(data: bytes) -> NDArray[np.uint8]:
    """The model's pixels."""
    return decode(data, spec=SPEC, limits=LIMITS)[0]


def middle(data: bytes) -> tuple[int, ...]:
    """The colour in the middle."""
    return tuple(int(value) for value in shown(data)[16, 16])


def near(data: bytes, colour: tuple[int, int, int], levels: int = 6) -> bool:
    """Whether the middle has this colour."""
    return max(abs(a - b) for a, b in zip(middle(data), colour, strict=True)) <= levels


def disk(hidden: tuple[int, int, int], mode: str = "RGBA") -> Image.Image:
    """A blue square on nothing; what is under nothing has the hidden colour."""
    image = Image.new("RGBA", (64, 64), (*hidden, 0))
    image.paste((*BLUE, 255), (16, 16, 48, 48))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_colours_under_alpha_0_have_no_influence(kind: str) -> None:
    """Whatever is hidden the model gets the same pixels, bit for bit where the format is lossless."""
    options: dict[str, Any] = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}}.get(kind, {})
    one, two = (shown(pictures.saved(disk(hidden), kind, **options)) for hidden in (RED, GREEN))
    difference = np.abs(one.astype(int) - two).max(axis=2)
    # A lossy encoder mixes a little of it into the visible edge; viewers show that too.
    assert difference.max() <= (48 if kind == "AVIF" else 0)
    assert np.median(difference) == 0
    assert one[0, 0].min() >= 250


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa"])
def test_every_mode_with_alpha_is_laid_on_white(mode: str) -> None:
    """Modes that Pillow's readers of PNG, WebP and TIFF give."""
    grey = disk(RED, "LA")
    image = {"LA": grey, "La": grey.convert("La"), "RGBa": disk(RED, "RGBa"), "PA": disk(RED).convert("PA")}[mode]
    assert image.mode == mode
    rgb, is_visible = flatten_frame(image, 8)
    assert is_visible
    assert min(rgb.getpixel((0, 0))) >= 250  # type: ignore[type-var,arg-type]  # a colour of three
    assert min(rgb.getpixel((32, 32))) < 100  # type: ignore[type-var,arg-type]  # the same


def test_white_drawing_is_laid_on_black() -> None:
    """White on a transparent background is visible on a dark page."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((*WHITE, 255), (16, 16, 48, 48))
    pixels = shown(pictures.png(image))
    assert pixels[16, 16].min() == 255
    assert pixels[0, 0].max() == 0


def dotted(mode: str, colour: object, dot: object) -> Image.Image:
    """An image of one colour with one pixel of another in its corner."""
    image = Image.new(mode, (32, 32), colour)  # type: ignore[arg-type]  # a colour of the mode
    image.putpixel((0, 0), dot)  # type: ignore[arg-type]  # the same
    return image


def test_transparent_colour_is_not_shown() -> None:
    """tRNS of palettes, grey and RGB, in 1, 8 and 16 bits: what browsers do not show the model does not see."""
    palette = dotted("P", 0, 1)
    palette.putpalette([*RED, *GREEN])
    assert near(pictures.saved(palette, "PNG", transparency=0), WHITE)
    assert near(pictures.saved(palette, "GIF", transparency=0), WHITE)
    assert near(pictures.saved(palette, "PNG", transparency=b"\x00\xff"), WHITE)
    assert near(pictures.saved(dotted("L", 40, 0), "PNG", transparency=40), WHITE)
    assert near(pictures.saved(dotted("1", 1, 0), "PNG", transparency=1), WHITE)
    assert near(pictures.saved(dotted("RGB", RED, BLUE), "PNG", transparency=RED), WHITE)
    assert near(pictures.saved(dotted("RGB", RED, BLUE), "PNG", transparency=GREEN), RED)


def deep_png(colour: int, samples: tuple[int, ...], transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG of 8 × 8 and 16 bits a channel, all of one colour but for the first pixel, which is opaque white."""
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 8
    first = b"\0" + b"\xff" * 2 * len(samples) + row[1 + 2 * len(samples) :]
    chunks = () if transparent is None else (png_chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),)
    return raw_png(8, 8, *chunks, bits=16, colour=colour, rows=zlib.compress(first + row * 7))


def test_sixteen_bits_with_transparency_are_scaled() -> None:
    """Grey, RGB and both with alpha, as PNG; the transparent colour is one of 16 bits too."""
    assert near(deep_png(0, (0x8000,)), (128, 128, 128))
    assert near(deep_png(2, (0xFFFF, 0x4000, 0)), (255, 64, 0))
    assert near(deep_png(4, (0x4000, 0xFFFF)), (64, 64, 64))
    assert near(deep_png(0, (0x8000,), (0x8000,)), WHITE)
    assert near(deep_png(0, (0x8000,), (0x7FFF,)), (128, 128, 128))
    assert near(deep_png(2, (0xFFFF, 0x4000, 0), (0, 0, 0)), (255, 64, 0))
    # The one visible pixel is white, so the image is laid on black.
    assert near(deep_png(4, (0x4000, 0)), BLACK)
    assert near(deep_png(6, (0xFFFF, 0, 0, 0)), BLACK)
    assert near(deep_png(2, (0xFFFF, 0x4000, 0), (0xFFFF, 0x4000, 0)), BLACK)


def test_deep_tiffs_are_scaled_in_either_byte_order() -> None:
    """I;16, I;16B, I and F: a ramp stays a ramp."""
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(1, 256).repeat(8, axis=0)
    little = Image.fromarray(ramp)
    big = Image.frombytes("I;16B", little.size, ramp.astype(">u2").tobytes())
    floats = Image.fromarray((ramp / 65535).astype(np.float32))
    whole = Image.fromarray(ramp.astype(np.int32))
    for image in (little, big, floats, whole):
        row = shown(pictures.saved(image, "TIFF"))[0, :, 0].astype(int)
        assert (row[0] < 10, row[-1] > 245, 110 < row[16] < 146) == (True, True, True), image.mode
    broken = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    assert middle(pictures.saved(broken, "TIFF")) == (0, 0, 0)


@pytest.mark.parametrize(("mode", "colour"), [("1", WHITE), ("L", (90, 90, 90)), ("P", RED), ("CMYK", (235, 0, 0))])
def test_other_modes_keep_their_colour(mode: str, colour: tuple[int, int, int]) -> None:
    """One bit, grey, palettes, print's colours."""
    image = Image.new("RGB", (64, 64), colour).convert(mode)
    assert near(pictures.saved(image, "JPEG" if mode == "CMYK" else "PNG", quality=95), colour, levels=12)


def test_inverted_cmyk_with_and_without_adobe_marker() -> None:
    """CMYK JPEGs have inverted inks, and viewers expect that, whether or not the file marks it."""
    data = pictures.saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    bare = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    assert near(data, RED, levels=12)
    assert middle(bare) == middle(data)


def animation(kind: str, *frames: tuple[tuple[int, ...], int], **options: Any) -> bytes:
    """An animation of frames of one colour with their milliseconds."""
    images = [Image.new("RGBA", (32, 32), colour if len(colour) == 4 else (*colour, 255)) for colour, _ in frames]
    return pictures.saved(
        images[0], kind, save_all=True, append_images=images[1:], duration=[ms for _, ms in frames], **options
    )


CLEAR: Final = (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "AVIF"])
def test_first_visible_frame_is_used(kind: str) -> None:
    """Not one that flashes by, not one without anything on it; the first one where all last."""
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "GIF": {"disposal": 2}}.get(kind, {})
    assert near(animation(kind, (RED, 500), (GREEN, 500), **options), RED)
    assert near(animation(kind, (CLEAR, 500), (RED, 500), (GREEN, 500), **options), RED)
    if kind in {"PNG", "WEBP"}:  # a GIF's delays are multiples of 10 ms, and Pillow writes an AVIF's as it likes
        assert near(animation(kind, (GREEN, 15), (RED, 5000), **options), RED)
        assert near(animation(kind, (GREEN, 15), (RED, 15), **options), GREEN), "none lasts: the first"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("delay_ms", [0, 10])
def test_frames_without_a_delay_are_visible(kind: str, delay_ms: int) -> None:
    """Browsers show a frame with a delay of 10 ms or less for 100 ms, so it is treated like any other."""
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "GIF": {"disposal": 2}}.get(kind, {})
    data = animation(kind, (RED, delay_ms), (GREEN, 5000), (BLUE, 5000), **options)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.info.get("duration", 0) == delay_ms, "expected a file that really has this delay"
    assert near(data, RED)
    data = animation(kind, (CLEAR, 500), (RED, delay_ms), (GREEN, 5000), **options)
    assert near(data, RED)


def deep_invisible_png() -> bytes:
    """16 bits of grey, all of them the transparent one."""
    row = b"\0" + struct.pack(">H", 0x8000) * 8
    return raw_png(8, 8, png_chunk(b"tRNS", struct.pack(">H", 0x8000)), bits=16, colour=0, rows=zlib.compress(row * 8))


INVISIBLE: Final = {
    "RGBA PNG": lambda: pictures.png(Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
    "grey PNG with alpha": lambda: pictures.png(Image.new("LA", (8, 8), (9, 0))),
    "palette PNG": lambda: pictures.saved(Image.new("P", (8, 8), 0), "PNG", transparency=0),
    "RGB PNG": lambda: pictures.saved(Image.new("RGB", (8, 8), RED), "PNG", transparency=RED),
    "PNG of 16 bits": deep_invisible_png,
    "WebP": lambda: pictures.saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP"),
    "GIF": lambda: pictures.saved(Image.new("P", (8, 8), 0), "GIF", transparency=0),
    "AVIF": lambda: pictures.saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "AVIF"),
    "TIFF": lambda: pictures.saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "TIFF"),
    "animated PNG": lambda: animation("PNG", *[((n, 0, 0, 0), 100) for n in range(20)]),
    "animated WebP": lambda: animation("WEBP", *[((n, 0, 0, 0), 100) for n in range(3)], lossless=True, exact=True),
}


@pytest.mark.parametrize("name", INVISIBLE)
def test_invisible_image_is_rejected(name: str) -> None:
    """Its tags would be those of a white page, which no viewer shows."""
    with pytest.raises(Rejected, match=r"expected an image in which something can be seen, got an? ") as caught:
        shown(INVISIBLE[name]())
    assert caught.value.code.value == "picture_invisible"


@pytest.mark.parametrize("is_opaque", [True, False])
def test_bmp_with_alpha_0_everywhere_is_opaque(is_opaque: bool) -> None:
    """Many programs write 0 into the fourth byte; one pixel with alpha makes it an alpha channel."""
    pixels = bytearray(bytes((0, 0, 255, 0)) * 64)
    if not is_opaque:
        pixels[3] = 255
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 124, 8, 8, 1, 32, 3, 256, 2835, 2835, 0, 0) + masks + bytes(68)
    data = b"BM" + struct.pack("<IHHI", 14 + 124 + 256, 0, 0, 14 + 124) + header + bytes(pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGBA"
    assert near(data, RED if is_opaque else WHITE)


def test_default_image_of_an_apng_is_skipped() -> None:
    """It is for viewers that know no animation."""
    assert near(animation("PNG", (GREEN, 500), (RED, 500), (BLUE, 500), default_image=True), RED)


def test_area_around_a_small_gif_frame_is_white() -> None:
    """A screen of 100 × 100 with a frame of 4 × 4 in its corner: the rest is no colour of the palette."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *BLUE])
    data = bytearray(pictures.saved(image, "GIF"))
    data[6:10] = struct.pack("<HH", 100, 100)
    pixels = shown(bytes(data))
    assert pixels[16, 16].min() >= 250
    assert pixels[0, 0, 2] > 200 > pixels[0, 0, 0]


def test_later_frames_are_not_decoded() -> None:
    """Damage after the first frame of an animation does not matter, because only that frame is decoded."""
    data = animation("GIF", (RED, 500), (GREEN, 500), (BLUE, 500))
    assert near(data[: len(data) - 20], RED)


def test_half_a_jpeg_is_rejected() -> None:
    """An image is never answered by half of it."""
    data = pictures.jpeg(pictures.picture())
    with pytest.raises(Rejected, match="ends before its last row") as caught:
        decode(data[: len(data) // 2], spec=SPEC, limits=LIMITS)
    assert caught.value.code.value == "picture_broken"


def test_first_of_many_images_in_a_file_is_used() -> None:
    """MPO: the first one, as JPEG."""
    first, second = Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), GREEN)
    data = pictures.saved(first, "MPO", save_all=True, append_images=[second])
    pixels, info = decode(data, spec=SPEC, limits=LIMITS)
    assert info.format == "JPEG"
    assert pixels[16, 16, 0] > 240


def test_bytes_after_the_end_are_ignored() -> None:
    """An image that is an archive or a script as well is an image."""
    data = pictures.png(Image.new("RGB", (8, 8), RED)) + b"PK\x03\x04" + bytes(100)
    assert near(data, RED)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
