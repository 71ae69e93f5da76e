"""The commands for dead letters: list, show, requeue and drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import msgspec
from pydantic_core import to_json

from shiwu.cli.base import Exit, end, main
from shiwu.cli.hints import notes_of
from shiwu.cli.params import Span
from shiwu.cli.terminal import Row, echo_data, echo_json, moment_text, print_rows
from shiwu.client.client import Client
from shiwu.client.dead_letters import DeadFilter, DeadLetter
from shiwu.contract import ErrorCode, Stage

MAX_UNWRAPPED_ID_CHARS = 40
"""A longer id may wrap in the table."""
HEADINGS = ("id", "ended", "code", "stage", "attempts", "worker", "image")


def _filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--code", type=click.Choice([code.value for code in ErrorCode]), metavar="CODE", help="Error code."
        ),
        click.option(
            "--stage",
            type=click.Choice([stage.value for stage in Stage], case_sensitive=False),
            help="Stage in which the job failed.",
        ),
        click.option(
            "--status",
            type=click.Choice(["rejected", "failed"]),
            help="rejected: fault of the job; failed: of the service.",
        ),
        click.option("--worker", help="Name of the worker that answered."),
        click.option("--image", help="Part of the image's reference."),
        click.option("--older", "older_s", type=Span(), help="Ended longer ago than this: 90s, 15m, 6h, 2d."),
        click.option("--newer", "newer_s", type=Span(), help="Ended within this time."),
    ):
        command = option(command)
    return command


def _chosen(client: Client, ids: tuple[str, ...], every: bool, limit: int | None, fields: dict[str, Any]) -> list[str]:
    """The ids that a command acts on: those named, or those that match the filters."""
    where = DeadFilter(**fields)
    if ids and (every or where != DeadFilter()):
        raise click.UsageError("expected ids or filters, got both")
    if not (ids or every or where != DeadFilter()):
        raise click.UsageError("expected ids, a filter, or --all")
    return list(ids) if ids else [letter.id for letter in client.dead_letters(where, limit=limit)]


@main.group()
def dead() -> None:
    """Jobs that ended without tags, each with its message, its error and its times."""


@dead.command("list")
@_filter_options
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def list_(client: Client, /, *, limit: int, as_json: bool, **fields: Any) -> None:
    """Show dead letters, newest first."""
    rows = []
    for letter in client.dead_letters(DeadFilter(**fields), limit=limit):
        if as_json:
            echo_json(to_json(_shown(letter)))
        else:
            rows.append(_row(letter))
    if not as_json:
        has_long_id = any(len(row.cells[0]) > MAX_UNWRAPPED_ID_CHARS for row in rows)
        # An id is not wrapped, so that it can be copied.
        print_rows(HEADINGS, rows, text_columns=(0, 6) if has_long_id else (6,), optional=(5, 4, 3, 1))


def _row(letter: DeadLetter) -> Row:
    result, error = letter.result, letter.result.error
    cells = (
        letter.id,
        moment_text(letter.died_ms),
        str(error.code) if error else str(result.status),
        str(error.stage) if error and error.stage else "",
        str(result.attempts),
        result.worker,
        result.image.reference if result.image else "",
    )
    return Row(cells, notes=notes_of(error), red=2)


@dead.command()
@click.argument("job_id", metavar="ID")
@click.pass_obj
def show(client: Client, /, *, job_id: str) -> None:
    """Print one dead letter: its answer and its message as it was sent."""
    letter = client.dead_letter(job_id)
    if letter is None:
        end(f"expected a dead letter with the id {job_id}, there is none", Exit.NOT_TAGGED)
    echo_json(to_json(_shown(letter) | {"message": letter.message.decode(errors="replace")}, indent=2))


@dead.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@_filter_options
@click.option("--all", "every", is_flag=True, help="All dead letters.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the newest N.")
@click.option("--dry-run", is_flag=True, help="Only print the ids.")
@click.pass_obj
def requeue(
    client: Client, /, *, ids: tuple[str, ...], every: bool, limit: int | None, dry_run: bool, **fields: Any
) -> None:
    """Put dead letters back into their lane with the same ids; print the ids. Attempts start at one again."""
    chosen = _chosen(client, ids, every, limit, fields)
    sent = chosen if dry_run else client.requeue(chosen)
    for job_id in sent:
        echo_data(job_id)
    if ids and (missing := [job_id for job_id in ids if job_id not in set(sent)]):
        end(_why_not(client, missing[0], f"{len(missing)} of {len(ids)} ids"), Exit.NOT_TAGGED)


@dead.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@_filter_options
@click.option("--all", "every", is_flag=True, help="All dead letters.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the newest N.")
@click.option("--dry-run", is_flag=True, help="Only print the ids.")
@click.pass_obj
def drop(
    client: Client, /, *, ids: tuple[str, ...], every: bool, limit: int | None, dry_run: bool, **fields: Any
) -> None:
    """Delete dead letters; their answers are not deleted."""
    chosen = _chosen(client, ids, every, limit, fields)
    if dry_run:
        for job_id in chosen:
            echo_data(job_id)
    else:
        click.echo(f"dropped {client.drop(chosen)}")


def _why_not(client: Client, job_id: str, how_many: str) -> str:
    letter = client.dead_letter(job_id)
    if letter is None:
        return f"{how_many} have no dead letter, first {job_id}"
    if letter.sha256 is not None:
        why = f"only digest and head of its message of {letter.size} bytes are kept, because it would be refused again"
        return f"{how_many} cannot be requeued, first {job_id}: {why}"
    return f"{how_many} cannot be requeued, first {job_id}: a message with this id is being worked on"


def _shown(letter: DeadLetter) -> dict[str, Any]:
    answer = msgspec.to_builtins(letter.result)
    cut = {} if letter.sha256 is None else {"message_bytes": letter.size, "message_sha256": letter.sha256}
    return {"id": letter.id, "died": moment_text(letter.died_ms), "lane": letter.lane, "answer": answer, **cut}
