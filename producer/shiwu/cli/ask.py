"""Ask about pictures, wait for them, cancel them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shiwu.cli.base import Exit, end, main
from shiwu.client import Client
from shiwu.contract import without_query
from shiwu.results import TagResult

BAR_FROM = 500
"""Work on fewer pictures needs no progress bar."""


def _asking(command: Any) -> Any:
    for option in (
        click.option("--labels", help="Name of a label set, or words separated by commas."),
        click.option("--top-k", default=5, show_default=True, help="How many labels."),
        click.option("--threshold", default=0.0, show_default=True, help="Lowest score to show, 0 to 1."),
        click.option("--head", type=click.Choice(["softmax", "sigmoid"]), help="Default: the label set's own."),
        click.option("--expires", "expires_s", type=float, help="Seconds after which nobody wants the answer."),
    ):
        command = option(command)
    return command


def _fields(labels: str | None, top_k: int, threshold: float, head: str | None) -> dict[str, Any]:
    words: Any = labels
    if labels and "," in labels.replace("，", ","):
        words = [word for word in labels.replace("，", ",").split(",") if word.strip()]
    return {"labels": words, "top_k": top_k, "threshold": threshold, "head": head}


@main.command()
@click.argument("references", nargs=-1, required=True, metavar="REF…")
@_asking
@click.option("--lane", type=click.Choice(["interactive", "bulk"]), default="interactive", show_default=True)
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for all answers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON answer a line, as they come.")
@click.pass_obj
def tag(
    client: Client,
    /,
    *,
    references: tuple[str, ...],
    lane: str,
    expires_s: float | None,
    timeout_s: float,
    as_json: bool,
    **fields: Any,
) -> None:
    """Ask about pictures, wait, and show their tags and times.

    REF is s3://bucket/key, https://…, http://… or file:///… (where the worker allows the folder).
    """
    ids = list(client.enqueue_many(references, lane=lane, expires_s=expires_s, **_fields(**fields)))
    found: dict[str, TagResult] = {}
    for job_id, result in _with_bar(client.as_answered(ids, timeout_s=timeout_s), len(ids), "answers"):
        found[job_id] = result
        if as_json:
            click.echo(result.to_json())
    if not as_json:
        _show([(ref, found.get(job_id)) for ref, job_id in zip(references, ids, strict=True)])
    if len(found) < len(ids):
        end(
            f"wait_timeout: {len(ids) - len(found)} of {len(ids)} answers did not come in {timeout_s:g} s", Exit.TIMEOUT
        )
    sys.exit(Exit.OK if all(result.ok for result in found.values()) else Exit.NOT_TAGGED)


def _show(rows: Iterable[tuple[str, TagResult | None]]) -> None:
    table = Table("picture", "tags", "queue", "fetch", "decode", "batch", "encode", "total ms", box=None)
    for reference, result in rows:
        shown = without_query(reference)
        if result is None:
            table.add_row(shown, "[yellow]no answer yet[/yellow]")
            continue
        if result.ok:
            tags = "  ".join(f"{tag.label} {tag.score:.3f}" for tag in result.tags or ())
        else:
            tags = f"[red]{result.error.code if result.error else result.status}[/red]"
        timing = result.timing
        times = (timing.queue, timing.fetch, timing.decode, timing.batch, timing.encode, timing.total)
        table.add_row(shown, tags, *["–" if time is None else f"{time:.1f}" for time in times])
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@main.command()
@click.argument("references", nargs=-1, metavar="REF…|-")
@_asking
@click.option("--lane", type=click.Choice(["interactive", "bulk"]), default="bulk", show_default=True)
@click.option("--from-file", type=click.File(encoding="utf-8"), help="One reference a line.")
@click.pass_obj
def enqueue(
    client: Client, /, *, references: tuple[str, ...], lane: str, expires_s: float | None, from_file: Any, **fields: Any
) -> None:
    """Ask about pictures and print the job ids, without waiting.

    `-` reads references from standard input, one a line; empty lines and lines that begin with # are skipped.
    """
    source = sys.stdin if references == ("-",) else from_file
    if source is None and not references:
        raise click.UsageError("expected references, - or --from-file")
    asked = _lines(source) if source is not None else iter(references)
    ids = client.enqueue_many(asked, lane=lane, expires_s=expires_s, **_fields(**fields))
    for job_id in _with_bar(ids, None if source is not None else len(references), "enqueued"):
        click.echo(job_id)


def _lines(source: Iterable[str]) -> Iterator[str]:
    for line in source:
        if (text := line.strip()) and not text.startswith("#"):
            yield text


def _with_bar(items: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
    """A progress bar on the terminal for long work; nothing where standard error is a file."""
    shown = sys.stderr.isatty() and (total is None or total >= BAR_FROM)
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield from progress.track(items, total=total, description=what)


@main.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID…")
@click.option("--reason", default="", help="Stands in the answer.")
@click.pass_obj
def cancel(client: Client, /, *, ids: tuple[str, ...], reason: str) -> None:
    """Answer jobs `cancelled` now, so that nobody works on them; print those that had no answer before."""
    for job_id in client.cancel(ids, reason=reason):
        click.echo(job_id)
