"""What the demo shows: a table of answers, a summary, the page, and how to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from demo.album import Entry
from shiwu.contract import Answer, Status, Timing, printable

STAGES = ("queue", "claim", "fetch", "decode", "batch", "encode", "score", "total")
NEXT = (
    ("export SHIWU_REDIS_URL=redis://127.0.0.1:6379/0", "a Redis or Valkey of yours"),
    (".venv/bin/shiwu-worker --check", "whether Redis, the labels, S3 and the model answer"),
    (".venv/bin/shiwu-worker", "the worker; Ctrl-C drains it"),
    (".venv/bin/shiwu --help", "ask, wait and look from the command line"),
    ('make demo ARGS="my/pictures/"', "images of your own; --model FOLDER|ID takes another model"),
    ("make test, make bench", "the tests, the measurements"),
)
MAX_ROWS = 60
"""The page shows all images."""
MAX_NAME_COLUMNS = 24
"""Longer file names would leave no room for tags."""
WIDE_ENOUGH = 100
"""Narrower terminals see the total only."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one image, next to what was known."""

    entry: Entry
    answer: Answer | None

    @property
    def rank(self) -> int | None:
        """The place of the first known label among the tags, from 1; None when none is there."""
        tags = (self.answer.tags or ()) if self.answer else ()
        return next((place for place, tag in enumerate(tags, 1) if tag.label in self.entry.labels), None)

    @property
    def is_expected(self) -> bool:
        """Whether a good image has tags, and a bad one its error."""
        if self.answer is None or self.entry.is_own:
            return self.answer is not None
        if self.entry.code:
            return self.answer.error is not None and self.answer.error.code is self.entry.code
        return self.answer.status is Status.TAGGED and bool(self.answer.tags)


def show_table(console: Console, results: list[Result]) -> None:
    """One row for each image: what it is, its tags or its error, and where the time went."""
    table = Table(title="What the worker answered; times in ms", title_justify="left", padding=(0, 1, 0, 0), box=None)
    table.add_column("known as", no_wrap=True, overflow="ellipsis", max_width=MAX_NAME_COLUMNS)
    table.add_column("format", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("tags:score in %", ratio=1, overflow="fold")
    stages = STAGES if console.width >= WIDE_ENOUGH else STAGES[-1:]
    for stage in stages:
        table.add_column(stage, justify="right", no_wrap=True, style="bold" if stage == "total" else "dim")
    table.add_column("of", justify="right", no_wrap=True)
    for result in results[:MAX_ROWS]:
        timing = result.answer.timing if result.answer else Timing()
        size = result.answer.batch_size if result.answer else None
        table.add_row(
            Text(printable(result.entry.labels[0] if result.entry.labels else result.entry.name or "–")),
            result.entry.form,
            result.entry.source,
            _outcome(result),
            *(_milliseconds(getattr(timing, stage)) for stage in stages),
            str(size or "–"),
        )
    console.print(table)


def _milliseconds(value: float | None) -> str:
    if not value:
        return "–"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _outcome(result: Result) -> Text:
    answer = result.answer
    if answer is None:
        return Text("no answer", style="bold red")
    if answer.tags:
        tags = [
            (printable(f"{tag.label}:{tag.score * 100:.0f}"), tag.label in result.entry.labels)
            for tag in answer.tags[:3]
        ]
        return Text(" ").join(Text(text, style="green" if known else "") for text, known in tags)
    code = str(answer.error.code) if answer.error else "no error code"
    if result.is_expected:
        return Text(f"{answer.status}: {code}", style="yellow")
    message = answer.error.message if answer.error else ""
    return Text(printable(f"{answer.status}: {code} {message}, not expected"), style="bold red")


def count_of(images: Sized) -> str:
    """`1 image`, `2 images`."""
    return f"{len(images)} image{'' if len(images) == 1 else 's'}"


def show_summary(console: Console, results: list[Result], *, took_s: float) -> None:
    """Counts, speed, and how often the known label was found."""
    ranks = [result.rank for result in results if result.entry.labels]
    counts = Counter(
        "tagged"
        if result.is_expected and result.answer and result.answer.tags
        else "failed"
        if result.is_expected
        else "unexpected"
        for result in results
    )
    models = {result.answer.model for result in results if result.answer and result.answer.model}
    model = ", ".join(f"{each.id} in {each.dtype} on {each.device}" for each in models)
    rate = len(results) / took_s
    worker = f"one worker, {model}" if model else "one worker"
    console.print(
        f"\n[bold]{counts['tagged']} tagged[/], {counts['failed']} failed{' as expected' if ranks else ''}, "
        f"{counts['unexpected']} not as expected; "
        f"{count_of(results)} in {took_s:.2f} s, [bold]{rate:.{0 if rate >= 10 else 1}f} images/s[/] "
        f"({escape(printable(worker))})."
    )
    if not ranks:
        return
    first, five = (sum(rank is not None and rank <= top for rank in ranks) for top in (1, 5))
    console.print(
        f"A right label, of 256, came first for {first} of {len(ranks)} and among the first five for {five}.\n"
        "The embedded model knows some 1,000 kinds of things; SHIWU_MODEL takes a larger one, and labels are your own "
        "words.\n"
        "The stages of a row add up to its total; queue is the wait in Redis, batch the wait for the model, "
        "and `of` the size of the batch that the image was encoded in."
    )


def show_page(console: Console, page: Path | None) -> None:
    """Where the page with the images lies."""
    if page is not None:
        shown = escape(printable(str(page)))
        console.print(f"\n[bold]The same as a page with the images:[/] {shown}", soft_wrap=True, highlight=False)


def show_next(console: Console) -> None:
    """How to go on."""
    console.print("\n[bold]How to go on[/]")
    table = Table.grid(padding=(0, 3, 0, 2))
    for row in NEXT:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
