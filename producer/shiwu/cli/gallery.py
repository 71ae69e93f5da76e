"""Make one self-contained HTML page from answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

import click
from rich.console import Console
from rich.progress import Progress

from shiwu.cli.backfill_results import NoResults, read_backfill
from shiwu.cli.base import Exit, end, main, redis_url_of
from shiwu.cli.params import Seconds
from shiwu.cli.terminal import echo_data
from shiwu.client.client import Client
from shiwu.client.stream_items import StreamItem
from shiwu.contract import Answer, Stage, printable
from shiwu.gallery.answer_lines import read_answers
from shiwu.gallery.thumbnails import Thumbnails, make_thumbnails

AWAY_S: Final = 5.0
"""How long Redis may be away while the stream is read or acknowledged."""
CONSUMER: Final = "shiwu-gallery"
"""A second run gets what a run that ended early has not acknowledged."""
MAX_IMAGES: Final = 10_000
_LOADING: Final = frozenset({Stage.FETCH, Stage.DECODE})
"""An image that failed in one of these stages gets no thumbnail."""


@main.command()
@click.argument("ids", nargs=-1, metavar="[ID…]")
@click.option("--jsonl", type=click.File("rb"), help="Answers as JSON lines; - reads standard input.")
@click.option(
    "--compare",
    type=click.File("rb"),
    help="Second answers for the same images as JSON lines, of another model or label set, shown next to the first.",
)
@click.option("--group", help="Read the answers that this consumer group has not read yet, and acknowledge them.")
@click.option("--backfill", "backfill_name", help="Answers of this backfill, from the files of its results.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="gallery.html",
    show_default=True,
    help="File to write; one of this name is replaced.",
)
@click.option("--title", default="shiwu gallery", show_default=True, help="Heading of the page.")
@click.option("--thumbnails/--no-thumbnails", default=True, show_default=True, help="Fetch the images once more.")
@click.option(
    "--timeout", "timeout_s", type=Seconds(), default=300.0, show_default=True, help="Seconds for all thumbnails."
)
@click.option(
    "--limit", type=click.IntRange(1, MAX_IMAGES), default=1000, show_default=True, help="How many images to show."
)
@click.pass_context
def gallery(
    ctx: click.Context,
    /,
    *,
    ids: tuple[str, ...],
    jsonl: BinaryIO | None,
    compare: BinaryIO | None,
    group: str | None,
    backfill_name: str | None,
    output: Path,
    title: str,
    thumbnails: bool,
    timeout_s: float,
    limit: int,
) -> None:
    """Write one HTML file that shows images with their tags, errors and times, and print its path.

    Answers come from ids, from JSON lines (`shiwu tag --json`, `shiwu results`), from the results stream by a
    consumer group, or from the parts of a backfill. The page needs no server and no network. --compare shows second
    answers next to them.

    Thumbnails are made by the worker's sandbox where the worker's libraries are installed, with the settings and access
    rules of a worker from this environment. Otherwise the page shows placeholders. Needs the extra `gallery` (jinja2).
    """
    if sum((bool(ids), jsonl is not None, group is not None, backfill_name is not None)) != 1:
        raise click.UsageError("expected ids, --jsonl, --group or --backfill, and only one of them")
    try:
        from shiwu.gallery.page import render_page  # noqa: PLC0415 jinja2 is an extra
    except ModuleNotFoundError as error:
        end(f"gallery needs {error.name}: run `pip install '.[gallery]'` in a clone of shiwu", Exit.USAGE)
    items: list[StreamItem] = []
    if backfill_name is not None:
        found = _backfill(ctx, backfill_name)
    else:
        found = _answers(ctx.obj, ids=ids, jsonl=jsonl, group=group, items=items)
    answers = _unique(found, limit=limit)
    if not answers:
        end("expected at least one answer, got none", Exit.NOT_TAGGED)
    others = None if compare is None else _second_answers(compare, answers)
    made = _thumbnails(answers, timeout_s=timeout_s) if thumbnails else Thumbnails(problem="they were not asked for")
    page = render_page(
        answers, made.by_reference, title=title, note=made.problem, made_at=datetime.now(UTC), others=others
    )
    _write(output, page)
    for item in items:
        item.ack(away_s=AWAY_S)
    if made.problem and thumbnails:
        click.echo(f"shiwu: some thumbnails are missing: {printable(made.problem)}", err=True)
    echo_data(str(output.absolute()))
    shown = {answer.id for answer in answers}
    if len(answers) < limit and (missing := set(ids) - shown):
        end(f"wait_timeout: {len(missing)} of {len(set(ids))} ids have no answer", Exit.TIMEOUT)


def _answers(
    client: Client, *, ids: Sequence[str], jsonl: BinaryIO | None, group: str | None, items: list[StreamItem]
) -> Iterator[Answer]:
    """The answers that were asked for.

    Args:
        items: gets the entries of the stream, to be acknowledged when the page is written.
    """
    if jsonl is not None:
        yield from _read(jsonl, option="--jsonl")
    elif group is not None:
        for item in client.results(group=group, consumer=CONSUMER, block_s=0.05, stop_when_idle=True, away_s=AWAY_S):
            yield item.result
            items.append(item)
    else:
        yield from (found for job_id in dict.fromkeys(ids) if (found := client.answer(job_id)) is not None)


def _backfill(ctx: click.Context, name: str) -> Iterator[Answer]:
    url = redis_url_of(ctx)
    try:
        yield from read_backfill(url, name)
    except NoResults as error:
        end(f"--backfill: {error}", Exit.USAGE)
    except ModuleNotFoundError as error:
        end(f"--backfill needs {error.name}: run `pip install '.[backfill]'` in a clone of shiwu", Exit.USAGE)


def _read(lines: BinaryIO, *, option: str) -> Iterator[Answer]:
    try:
        yield from read_answers(lines)
    except ValueError as error:
        end(f"{option}: {error}", Exit.USAGE)


def _second_answers(lines: BinaryIO, answers: Sequence[Answer]) -> dict[str, Answer]:
    """Second answers by the id of the first: the last one with its id, otherwise the last one with its reference."""
    ids = {answer.id for answer in answers}
    references = {answer.image.reference for answer in answers if answer.image}
    by_id: dict[str, Answer] = {}
    by_reference: dict[str, Answer] = {}
    for other in _read(lines, option="--compare"):
        if other.id in ids:
            by_id[other.id] = other
        if other.image and other.image.reference in references:
            by_reference[other.image.reference] = other
    found = {}
    for answer in answers:
        second = by_id.get(answer.id) or (by_reference.get(answer.image.reference) if answer.image else None)
        if second is not None:
            found[answer.id] = second
    if not found:
        end("--compare: expected answers with an id or a reference of the first ones, got none", Exit.USAGE)
    return found


def _unique(answers: Iterator[Answer], *, limit: int) -> list[Answer]:
    """The last answer of each id, up to `limit` ids. A stream may deliver an answer twice."""
    found: dict[str, Answer] = {}
    for answer in answers:
        if len(found) >= limit and answer.id not in found:
            click.echo(f"shiwu: the page shows the first {limit} images; --limit changes that", err=True)
            break
        found[answer.id] = answer
    return list(found.values())


def _thumbnails(answers: Sequence[Answer], *, timeout_s: float) -> Thumbnails:
    wanted = {
        answer.image.reference: None
        for answer in answers
        if answer.image and not (answer.error and answer.error.stage in _LOADING)
    }
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not is_terminal) as progress:
        task = progress.add_task("thumbnails", total=len(wanted))
        return make_thumbnails(
            list(wanted), timeout_s=timeout_s, on_progress=lambda done: progress.update(task, completed=done)
        )


def _write(output: Path, page: str) -> None:
    """Replace the file as a whole, so that a browser never reads one half of it."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is none, or cannot be written
            partial.unlink(missing_ok=True)
        why = error.strerror or error
        end(f"output_failed: --output: expected a file that can be written, got {output} ({why})", Exit.OUTPUT)
