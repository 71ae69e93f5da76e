"""The screen of `shiwu top`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Final

import redis
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.events import Resize
from textual.message import Message
from textual.widgets import DataTable, Footer, Input, Static

from shiwu.broker.redis_errors import explain
from shiwu.contract import printable
from shiwu.top import panels, rows
from shiwu.top.look import Letter, Look
from shiwu.top.panels import FailureTable, RowTable, TextPanel
from shiwu.top.screens import LettersScreen, QuestionScreen
from shiwu.top.shards import Reader

PARTS: Final = ("lanes", "stages", "workers", "failures", "backfills", "shards")
"""Ids of the parts of the screen, by their keys 1 to 6. Shards are shown alone only, and only of a cluster."""


class TopApp(App[None]):
    """Looks every few seconds, on a thread, and shows what it found.

    Args:
        requeue: requeues dead letters, and returns the ids of those that it requeued; None: not offered.
        where: the server, for the title.
    """

    TITLE = "shiwu top"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "top.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"only('{part}')", part, show=False) for number, part in enumerate(PARTS, 1)),
        Binding("r", "requeue", "Requeue"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("0,escape", "all", "All parts", key_display="0"),
        Binding("q", "quit", "Quit"),
    ]

    class Looked(Message):
        """A look was read."""

        def __init__(self, look: Look) -> None:
            super().__init__()
            self.look = look

    class Requeued(Message):
        """Letters were requeued, or not."""

        def __init__(self, text: str, *, is_error: bool) -> None:
            super().__init__()
            self.text, self.is_error = text, is_error

    def __init__(
        self,
        reader: Reader,
        requeue: Callable[[list[str]], list[str]] | None,
        *,
        where: str,
        every_s: float,
    ) -> None:
        super().__init__()
        self._reader = reader
        self._requeue = requeue
        self._where = where
        self._every_s = every_s
        self._look = Look()
        self._is_looking = False
        self._only: str | None = None
        self._filter = ""

    def compose(self) -> ComposeResult:
        """The parts from top to bottom."""
        yield Static(id="title", markup=False)
        yield TextPanel(panels.lanes_text, id="lanes")
        yield TextPanel(panels.stages_text, id="stages")
        headings: tuple[str, ...] = ("3 worker", *rows.WORKER_HEADINGS[1:])
        yield RowTable(headings, panels.WORKER_WIDTHS, id="workers", core=8, left=(6, 9, 10, 11), ends=(0,))
        with Horizontal(id="bottom"):
            yield FailureTable(_failure_headings(Look()), panels.FAILURE_WIDTHS, id="failures", core=4, left=(3,))
            headings = ("5 backfill", *rows.BACKFILL_HEADINGS[1:])
            yield RowTable(headings, panels.BACKFILL_WIDTHS, id="backfills", core=4, left=(1,))
        headings = ("6 shard", *rows.SHARD_HEADINGS[1:])
        yield RowTable(headings, panels.SHARD_WIDTHS, id="shards", core=8, left=(7, 8))
        yield Input(placeholder="show workers, codes and backfills with this text", id="filter")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#failures").focus()
        self._arrange()
        self._show_title()
        self.begin_look()
        self.set_interval(self._every_s, self.begin_look)

    def on_resize(self, _: Resize) -> None:
        """Draw for the new width, once it is known to all parts."""
        self.call_after_refresh(lambda: self.show(self._look))

    def begin_look(self) -> None:
        """Look once, unless a look is under way, as while Redis does not answer."""
        if not self._is_looking:
            self._is_looking = True
            self._read_look()

    @work(thread=True)
    def _read_look(self) -> None:
        self.post_message(self.Looked(self._reader.look()))

    def on_top_app_looked(self, event: Looked) -> None:
        """Show the look that a thread has read."""
        self._is_looking = False
        # It may come while the screen is taken down.
        if self.screen_stack and self.screen_stack[0].is_running:
            self.show(event.look)

    def show(self, look: Look) -> None:
        """Show a look on all parts."""
        self._look = look
        self._show_title()
        main = self.screen_stack[0]
        for part in main.query(TextPanel):
            part.show(look)
        main.query_one("#workers", RowTable).fill(
            self._matching((worker.name, rows.worker_cells(worker)) for worker in look.workers)
        )
        main.query_one("#failures", RowTable).fill(
            self._matching((failure.code, rows.failure_cells(failure)) for failure in look.failures),
            headings=_failure_headings(look),
        )
        main.query_one("#backfills", RowTable).fill(
            self._matching((backfill.name, rows.backfill_cells(backfill)) for backfill in look.backfills)
        )
        main.query_one("#shards", RowTable).fill((str(shard.index), rows.shard_cells(shard)) for shard in look.shards)
        self._arrange()
        for screen in self.screen_stack:
            if isinstance(screen, LettersScreen):
                screen.show(now_ms=look.at_ms)

    def _matching(self, cells: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[str, Sequence[str]]]:
        return [(name, texts) for name, texts in cells if self._filter in " ".join(texts).lower()]

    def _show_title(self) -> None:
        note = f"filter: {self._filter}" if self._filter else ""
        text = panels.title_text(self._look, where=self._where, note=note)
        self.screen_stack[0].query_one("#title", Static).update(text)

    def _arrange(self) -> None:
        """Show all parts, or one alone. Among the others backfills are left out while there are none."""
        main = self.screen_stack[0]
        for part in PARTS:
            has_place = part != "shards" and (part != "backfills" or bool(self._look.backfills))
            main.query_one(f"#{part}").display = self._only == part or (self._only is None and has_place)
        main.query_one("#bottom").display = self._only in {None, "failures", "backfills"}

    # -------------------------------------------------------------------------------- keys
    def action_only(self, part: str) -> None:
        """Show one part alone; the same key again shows all."""
        if part == "shards" and not self._look.shards:
            return
        self._only = None if self._only == part else part
        self._arrange()
        shown = self.query_one(f"#{part}")
        if self._only is not None and shown.can_focus:
            shown.focus()

    def action_all(self) -> None:
        """Show all parts and all rows."""
        self._only = None
        self.query_one("#filter", Input).value = ""
        self._leave_filter()
        self._set_filter("")

    def action_filter(self) -> None:
        """Ask for a text that rows must have."""
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while the text is typed."""
        self._set_filter(event.value)

    def on_input_submitted(self, _: Input.Submitted) -> None:
        """Keep the filter, and go back to the failures."""
        self._leave_filter()

    def _set_filter(self, text: str) -> None:
        self._filter = text.strip().lower()
        self.show(self._look)

    def _leave_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self.query_one("#failures").focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show the letters of the chosen code."""
        if event.data_table.id == "failures" and (code := event.row_key.value) is not None:
            ask = None if self._requeue is None else self.ask_requeue
            letters = LettersScreen(code, lambda: self._reader.letters(code), ask_requeue=ask, now_ms=self._look.at_ms)
            self.push_screen(letters)

    # -------------------------------------------------------------------------------- requeue
    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer no requeue where that is off, and the keys of the main screen only there."""
        if len(self.screen_stack) > 1 and action in {"only", "all", "filter", "requeue"}:
            return False
        return action != "requeue" or self._requeue is not None

    def action_requeue(self) -> None:
        """Requeue the letters of the code under the cursor, after a question."""
        code = self.query_one("#failures", RowTable).cursor_name
        if code is not None and (letters := self._reader.letters(code)):
            self.ask_requeue(letters)

    def ask_requeue(self, letters: Sequence[Letter]) -> None:
        """Ask, and then requeue these letters."""
        code = printable(letters[0].code)
        what = (
            f"{len(letters)} jobs with {code}" if len(letters) > 1 else f"the job {printable(letters[0].id)} ({code})"
        )

        def on_answer(is_yes: bool | None) -> None:
            if is_yes:
                self._requeue_letters([letter.id for letter in letters])

        self.push_screen(QuestionScreen(f"Requeue {what}?"), on_answer)

    @work(thread=True)
    def _requeue_letters(self, ids: list[str]) -> None:
        if self._requeue is None:
            return
        try:
            done = len(self._requeue(ids))
        except redis.RedisError as error:
            text, is_error = f"not requeued: {explain(error)}", True
        else:
            text, is_error = f"requeued {done} of {len(ids)}", done < len(ids)
            if is_error:
                text += "; the others are gone, worked on again, or were too large to be kept"
        self._reader.list_soon()
        self.post_message(self.Requeued(text, is_error=is_error))

    def on_top_app_requeued(self, event: Requeued) -> None:
        """Tell what a requeue did."""
        self.notify(event.text, severity="warning" if event.is_error else "information", markup=False)
        self.begin_look()


def _failure_headings(look: Look) -> tuple[str, ...]:
    return (f"4 {rows.failures_heading(look)}", *rows.FAILURE_HEADINGS[1:])
