"""The parts of the screen: text for lanes and stages, tables for workers, failures and backfills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding
from textual.widgets import DataTable, Static

from shiwu.top import rows
from shiwu.top.look import Look

LANE_WIDTHS: Final = (13, 9, 9, 9, 9, 9, 9)
STAGE_WIDTHS: Final = (9, 9, 9, 7)
WORKER_WIDTHS: Final = (15, 7, 8, 10, 5, 9, 10, 16, 16, 64, 32, 10, 9)
FAILURE_WIDTHS: Final = (20, 6, 8, 7)
SHARD_WIDTHS: Final = (8, 12, 9, 9, 9, 8, 8, 22, 60)
BACKFILL_WIDTHS: Final = (11, 9, 12, 7)
LETTER_WIDTHS: Final = (24, 12, 8, 9, 15, 60)
MAX_FIRST: Final = 37
"""Characters of a first column on a wide terminal; a UUID and a space."""
MAX_COLUMNS: Final = 500
"""A title is as wide as any terminal."""
HEADING: Final = "bold"
BAR_STYLE: Final = "cyan"


class TextPanel(Static):
    """A part that is drawn as lines of text of the width of the terminal.

    Args:
        draw: makes the lines of a look.
    """

    def __init__(self, draw: Callable[[Look, int], Text], *, id: str) -> None:
        super().__init__(id=id, markup=False)
        self._draw = draw
        self._look = Look()

    def show(self, look: Look) -> None:
        """Show another look."""
        self._look = look
        self.refresh()

    def render(self) -> RenderResult:
        """The lines of the newest look."""
        return self._draw(self._look, self.size.width or 80)


class RowTable(DataTable[Text]):
    """A table whose rows are replaced at each look. The cursor stays on its row, also where that moves.

    Args:
        headings: of the columns; the first is left, the others are right.
        widths: characters of each column.
        left: indexes of further columns that are left.
        core: how many columns should be seen; what is left of the width goes to the first column.
        ends: indexes of columns whose long texts keep their ends, as the names of pods differ there.
    """

    def __init__(
        self,
        headings: Sequence[str],
        widths: Sequence[int],
        *,
        id: str,
        core: int,
        left: Sequence[int] = (),
        ends: Sequence[int] = (),
    ) -> None:
        super().__init__(id=id, cursor_type="row", cell_padding=0, show_header=True)
        self._headings, self._widths = tuple(headings), tuple(widths)
        self._least, self._core = self._widths, core
        self._left, self._ends = {0, *left}, frozenset(ends)

    def on_mount(self) -> None:
        """Add the columns."""
        self._head()

    def _head(self) -> None:
        """Put the columns again, without rows."""
        self.clear(columns=True)
        for column, (heading, width) in enumerate(zip(self._headings, self._widths, strict=True)):
            self.add_column(self._cell(column, heading), width=width)

    def _fit(self) -> tuple[int, ...]:
        spare = max(0, self.size.width - sum(self._least[: self._core]))
        first = self._least[0]
        return (max(first, min(MAX_FIRST, first + spare)), *self._least[1:])

    def fill(self, cells: Iterable[tuple[str, Sequence[str]]], *, headings: Sequence[str] | None = None) -> None:
        """Replace the rows.

        Args:
            cells: a unique name of each row, and its cells.
            headings: new ones, where they changed.
        """
        name, top = self.cursor_name, self.scroll_y
        wanted = self._headings if headings is None else tuple(headings)
        if (wanted, self._fit()) != (self._headings, self._widths):
            self._headings, self._widths = wanted, self._fit()
            self._head()
        self.clear()
        for row, texts in cells:
            self.add_row(*[self._cell(column, text) for column, text in enumerate(texts)], key=row)
        if name is not None and name in self.rows:
            self.move_cursor(row=self.get_row_index(name), animate=False, scroll=False)
        self.scroll_to(y=top, animate=False)

    @property
    def cursor_name(self) -> str | None:
        """The name of the row under the cursor; None without rows."""
        if not self.is_valid_coordinate(self.cursor_coordinate):
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    def _cell(self, column: int, text: str) -> Text:
        width = self._widths[column]
        if column in self._ends and len(text) > width - 1:
            text = "…" + text[2 - width :]
        if column in self._left:
            # One column stays free between two texts.
            cell = Text(text, no_wrap=True, overflow="ellipsis")
            cell.truncate(width - 1, overflow="ellipsis")
            return Text(" ") + cell if column else cell
        cell = Text(text, no_wrap=True)
        cell.truncate(width - 1, overflow="ellipsis")
        cell.align("right", width)
        return cell


class FailureTable(RowTable):
    """The error codes of dead letters."""

    BINDINGS = [Binding("enter", "select_cursor", "Letters")]  # noqa: RUF012 Textual's form


def lanes_text(look: Look, width: int) -> Text:
    """The lanes, each with its waiting messages of the last five minutes, and what is in no lane."""
    text = Text(no_wrap=True, overflow="crop")
    left = max(0, width - sum(LANE_WIDTHS) - 1)
    headings = ("1 lane", *rows.LANE_HEADINGS[1:])
    text.append(_line(headings, LANE_WIDTHS) + " last 5 min"[: left + 1] + "\n", HEADING)
    for lane in look.lanes:
        text.append(_line(rows.lane_cells(lane), LANE_WIDTHS) + " ")
        text.append(rows.spark(lane.history, width=left) + "\n", BAR_STYLE)
    text.append(rows.totals_line(look), "dim")
    return text


def stages_text(look: Look, width: int) -> Text:
    """Where the time of the newest answers went."""
    text = Text(no_wrap=True, overflow="crop")
    left = max(0, width - sum(STAGE_WIDTHS) - 1)
    headings = ("2 stage", *rows.STAGE_HEADINGS[1:])
    sample = f" of the time of {look.sample} tagged answers"
    text.append(_line(headings, STAGE_WIDTHS) + sample[: left + 1] + "\n", HEADING)
    for stage in look.stages:
        text.append(_line(rows.stage_cells(stage), STAGE_WIDTHS) + " ")
        text.append(rows.bar(stage.share, width=left) + "\n", BAR_STYLE)
    if not look.stages:
        text.append("no tagged answer yet", "dim")
    return text


def title_text(look: Look, *, where: str, note: str) -> Text:
    """The first line: the server, the workers, and whether Redis answers."""
    if look.problem is not None:
        return Text(f" {rows.problem_line(look)}".ljust(MAX_COLUMNS), "bold reverse red", no_wrap=True, overflow="crop")
    parts = [f"shiwu top  {where}", rows.workers_text(look), f"{rows.number(look.images_per_s)} images/s"]
    return Text((" " + "  ".join([*parts, note])).ljust(MAX_COLUMNS), "bold reverse", no_wrap=True, overflow="crop")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return first[0][: first[1]].ljust(first[1]) + "".join(text[: width - 1].rjust(width) for text, width in others)
