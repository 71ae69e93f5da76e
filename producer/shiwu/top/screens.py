"""Screens over the main one: the dead letters of a code, and a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Static

from shiwu.contract import printable
from shiwu.top import rows
from shiwu.top.look import Letter
from shiwu.top.panels import LETTER_WIDTHS, MAX_COLUMNS, RowTable


class QuestionScreen(ModalScreen[bool]):
    """Asks a question; only `y` means yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """One box in the middle."""
        yield Static(f"{self._question}\n\ny  yes     n  no", id="question", markup=False)

    def action_answer(self, is_yes: bool) -> None:
        """End with the answer."""
        self.dismiss(is_yes)


class LettersScreen(Screen[None]):
    """The dead letters of one code, newest first.

    Args:
        letters: returns them now.
        ask_requeue: asks whether these letters should be requeued, and does it; None: not offered.
        now_ms: Redis' clock.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "requeue", "Requeue this one"),
        Binding("escape,q", "app.pop_screen", "Back"),
    ]

    def __init__(
        self,
        code: str,
        letters: Callable[[], Sequence[Letter]],
        *,
        ask_requeue: Callable[[Sequence[Letter]], None] | None,
        now_ms: float,
    ) -> None:
        super().__init__()
        self._code = code
        self._read = letters
        self._ask_requeue = ask_requeue
        self._now_ms = now_ms
        self._letters: dict[str, Letter] = {}

    def compose(self) -> ComposeResult:
        """A title, the table, the error of the letter under the cursor."""
        yield Static(id="letters-title", markup=False)
        yield RowTable(rows.LETTER_HEADINGS, LETTER_WIDTHS, id="letters", core=5, left=(4, 5), ends=(4,))
        yield Static(id="letter", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Fill the table."""
        self.show(now_ms=self._now_ms)

    def show(self, *, now_ms: float) -> None:
        """Show the letters that there are now, if the table is there yet; `on_mount` fills it first."""
        if not self.query("#letters"):
            return
        self._letters = {letter.id: letter for letter in self._read()}
        cells = [(letter.id, rows.letter_cells(letter, now_ms=now_ms)) for letter in self._letters.values()]
        self.query_one("#letters", RowTable).fill(cells)
        title = f" {len(self._letters)} dead letters with {self._code}, the newest first"
        text = Text(title.ljust(MAX_COLUMNS), "bold reverse", no_wrap=True, overflow="crop")
        self.query_one("#letters-title", Static).update(text)
        self._show_error()

    def on_data_table_row_highlighted(self, _: DataTable.RowHighlighted) -> None:
        """Show the error of the letter under the cursor."""
        self._show_error()

    def _show_error(self) -> None:
        letter = self._chosen()
        lines = []
        if letter is not None:
            image, error = letter.result.image, letter.result.error
            lines.append(printable(f"{letter.id}  {image.reference if image is not None else ''}"))
            lines.append("" if error is None else printable(f"{error.code}: {error.message}"))
        self.query_one("#letter", Static).update(Text("\n".join(lines)))

    def _chosen(self) -> Letter | None:
        name = self.query_one("#letters", RowTable).cursor_name
        return None if name is None else self._letters.get(name)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer no requeue where that is off."""
        return action != "requeue" or self._ask_requeue is not None

    def action_requeue(self) -> None:
        """Requeue the letter under the cursor, after a question."""
        if (letter := self._chosen()) is not None and self._ask_requeue is not None:
            self._ask_requeue([letter])
