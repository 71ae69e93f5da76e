"""Draws the screen of `shiwu top` with made figures: `python -m tests.support.top_picture docs/top.png`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import matplotlib
import msgspec
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.segment import Segment
from rich.terminal_theme import MONOKAI
from textual.pilot import Pilot

from shiwu.contract import Lane
from shiwu.top.app import TopApp
from shiwu.top.look import BackfillLook, FailureLook, LaneLook, Look, StageLook, WorkerLook
from shiwu.top.rows import SPARKS
from tests.support.top_screens import run_screen, wait_screen
from tests.support.top_states import GPU_WORKER

FONTS: Final = Path(matplotlib.get_data_path()) / "fonts/ttf"
CELL: Final = (9, 18)
FONT_PX: Final = 15
COLOURS: Final = 64
STAGES: Final = (
    *(("queue", 11_800.0, 14_100.0, 0.976), ("claim", 2.1, 4.8, 0.0), ("fetch", 61.0, 188.0, 0.006)),
    *(("decode", 8.4, 21.0, 0.001), ("batch", 46.0, 92.0, 0.004), ("encode", 152.0, 161.0, 0.013)),
    ("score", 0.4, 0.9, 0.0),
)


class MadeReader:
    """Gives one look again and again."""

    def look(self) -> Look:
        """Two GPUs, a backlog that has passed its largest extent, failures of three codes, a backfill."""
        bulk = [round(22_000 * math.exp(-(((step - 38) / 14) ** 2))) for step in range(60)]
        urgent = [max(0, round(6 * math.sin(step / 2.3) + 2)) for step in range(60)]
        other = msgspec.structs.replace(
            GPU_WORKER, images_per_s=798.1, batch=121.0, in_flight=467, memory_bytes=3_190_000_000, device_share=0.96
        )
        small = msgspec.structs.replace(
            GPU_WORKER, images_per_s=38.2, batch=7.6, max_batch=8, limit="decode", device_share=0.71, in_flight=19
        )
        small = msgspec.structs.replace(small, slots=32, device="cpu", memory_bytes=1_240_000_000, memory_total_bytes=0)
        return Look(
            at_ms=1.0,
            answers_per_s=1643.2,
            answered=18_204_551,
            delayed=41,
            dead=327,
            lanes=(
                LaneLook(Lane.INTERACTIVE, 2, 24, 31.4, 32.0, 0.2, 0.3, tuple(urgent)),
                LaneLook(Lane.BULK, bulk[-1], 893, 902.6, 1611.2, 14.2, bulk[-1] / 1643.2, tuple(bulk)),
            ),
            stages=tuple(StageLook(*stage) for stage in STAGES),
            sample=196,
            workers=(
                WorkerLook("gpu-host-0", GPU_WORKER),
                WorkerLook("gpu-host-1", other),
                WorkerLook("spare-0", small),
            ),
            failures=(
                FailureLook("source_unavailable", 214, 3.1, "fetch"),
                FailureLook("source_not_found", 96, 41.0, "fetch"),
                FailureLook("picture_broken", 17, 2400.0, "decode"),
            ),
            dead_read=327,
            backfills=(BackfillLook("photos", "running", True, 460_000, 440_000, 418_200, 311),),
        )

    def letters(self, _: str) -> list[Any]:
        """None."""
        return []


def draw(app: TopApp, picture: Path) -> None:
    """Write the screen as a PNG, each character in a cell of a fixed size."""
    compositor: Any = app.screen._compositor
    strips = compositor.render_strips()
    regular, bold = (ImageFont.truetype(FONTS / f"DejaVuSansMono{kind}.ttf", FONT_PX) for kind in ("", "-Bold"))
    width, height = CELL
    image = Image.new("RGB", (app.size.width * width, len(strips) * height))
    pen = ImageDraw.Draw(image)
    cells = list(characters(strips))
    for left, top, _, segment in cells:
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=colours(segment)[1])
    # Afterwards, because letters reach into the cell below.
    for left, top, character, segment in cells:
        front, _ = colours(segment)
        if character in SPARKS:
            # Fonts leave gaps between blocks.
            filled = height * (SPARKS.index(character) + 1) // len(SPARKS)
            pen.rectangle((left, top + height - filled, left + width - 1, top + height - 1), fill=front)
        else:
            font = bold if segment.style is not None and segment.style.bold else regular
            pen.text((left, top), character, fill=front, font=font)
    image.quantize(COLOURS).save(picture, optimize=True)


def characters(strips: Iterable[Iterable[Segment]]) -> Iterator[tuple[int, int, str, Segment]]:
    """Left and top in pixels, and the character, of each cell."""
    for row, strip in enumerate(strips):
        column = 0
        for segment in strip:
            for character in segment.text:
                yield column * CELL[0], row * CELL[1], character, segment
                column += 1


def colours(segment: Segment) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of the characters, and behind them."""
    style = segment.style
    front = _rgb(style.color if style is not None else None, is_front=True)
    back = _rgb(style.bgcolor if style is not None else None, is_front=False)
    return (back, front) if style is not None and style.reverse else (front, back)


def _rgb(colour: Color | None, *, is_front: bool) -> tuple[int, int, int]:
    found = (colour or Color.default()).get_truecolor(MONOKAI, foreground=is_front)
    return found.red, found.green, found.blue


def main(picture: Path) -> None:
    """Show the made figures, and draw them."""
    reader: Any = MadeReader()
    app = TopApp(reader, lambda ids: ids, where="redis.example.org:6379/0", every_s=60)

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "photos", "q Quit")
        draw(app, picture)

    run_screen(app, steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
