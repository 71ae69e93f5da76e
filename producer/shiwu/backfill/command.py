"""The command group `shiwu backfill`. Imports nothing that takes time before a command runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from pydantic_core import to_json

from shiwu.cli.base import Exit, end, redis_url_of
from shiwu.cli.request_options import read_labels, request_options, with_label_hint
from shiwu.cli.terminal import Row, echo_json, print_rows
from shiwu.client.client import Client
from shiwu.contract import Lane, printable

if TYPE_CHECKING:
    from shiwu.backfill.plan import Pace
    from shiwu.backfill.session import Session

MAX_NAME: Final = 64
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


class Name(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """The name of a backfill, which is a part of its ids and keys."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name."""
        if not _NAME.fullmatch(str(value)):
            self.fail(f"expected 1 to {MAX_NAME} letters, digits, _ . -, got {value!r:.80}", param, ctx)
        return str(value)


@click.group()
def backfill() -> None:
    """Tag everything in a bucket or a list, and write the results.

    \b
    shiwu backfill start night s3://photos/2026/ --labels six-zh --out results/
    shiwu backfill start list images.jsonl --format parquet --out s3://results/list/
    shiwu backfill status night

    The same command goes on after Ctrl-C, a crash or a restart: no image is enqueued twice, and each has one row.
    """


@backfill.command()
@click.argument("name", type=Name())
@click.argument("source")
@request_options
@click.option("--column", default="image", show_default=True, help="Column of a Parquet file with the references.")
@click.option("--suffix", default="", help="Only names with one of these endings, as .jpg,.png.")
@click.option("--newer", default="", help="Only objects that changed since, as 30d, 12h or 2026-11-01.")
@click.option("--out", help="Folder or s3://bucket/prefix/ for the results. Default: no results, only counts.")
@click.option(
    "--format", "kind", type=click.Choice(["jsonl", "parquet"]), default="jsonl", show_default=True, help="Of results."
)
@click.option(
    "--part-rows",
    type=click.IntRange(min=1, max=10_000_000),
    default=50_000,
    show_default=True,
    help="Rows of one file of results; a file is also completed after ten minutes.",
)
@click.option("--lane", type=click.Choice([lane.value for lane in Lane]), default=Lane.BULK.value, show_default=True)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1, max=10_000_000),
    default=20_000,
    show_default=True,
    help="How many of its jobs may be without an answer.",
)
@click.option("--rate", help="Jobs at most, as 500/s, 30000/m or 1000000/h.")
@click.option("--window", default="", help="Send only between these hours, as 22:00-06:00@Asia/Shanghai.")
@click.option("--stop-at-failures", "stop_at", help="Stop sending when this share of 1000 or more jobs failed, as 50%.")
@click.option(
    "--missing",
    "is_missing_only",
    is_flag=True,
    help="Skip what has an answer in Redis; makes another pass where one is finished.",
)
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Read the source, and print as JSON what would be sent.")
@click.pass_context
def start(
    ctx: click.Context,
    /,
    *,
    name: str,
    source: str,
    labels: str | None,
    words: tuple[str, ...],
    column: str,
    suffix: str,
    newer: str,
    out: str | None,
    kind: Any,
    part_rows: int,
    is_dry_run: bool,
    lane: str,
    max_waiting: int,
    rate: str | None,
    window: str,
    stop_at: str | None,
    is_missing_only: bool,
    **fields: Any,
) -> None:
    """Start a backfill, or go on with it, and wait for its end.

    SOURCE is s3://bucket/prefix/, a manifest.json of S3 Inventory, a file of JSON lines, CSV, references (.txt) or
    Parquet, here or in a bucket, or - for lines of standard input. Other keys of a JSON line, and other columns of a
    CSV file, become the metadata of the answer.
    """
    from shiwu.backfill.plan import Pace, Plan, output_address, read_newer, read_suffixes  # noqa: PLC0415 slow
    from shiwu.backfill.session import plan_fields  # noqa: PLC0415 slow

    fields["labels"] = read_labels(labels, words)
    with with_label_hint(fields["labels"]):
        shared = plan_fields(fields)
    plan = Plan(
        source=source if source == "-" or source.startswith("s3://") else str(Path(source).absolute()),
        column=column,
        suffixes=read_suffixes(suffix),
        newer=newer,
        newer_than=_option("--newer", lambda: read_newer(newer, now=datetime.now(UTC))) if newer else None,
        fields=shared,
        out=output_address(out, here=Path.cwd()),
        format=kind,
    )
    pace = _pace(
        rate=rate,
        window=window,
        stop_at=stop_at,
        base=Pace(lane, max_waiting, is_missing_only=is_missing_only, part_rows=part_rows),
    )
    with _session(ctx) as session:
        if is_dry_run:
            echo_json(to_json(session.try_out(name, plan, pace), indent=2))
        else:
            session.start(name, plan, pace)


def _pace(*, rate: str | None, window: str, stop_at: str | None, base: Pace) -> Pace:
    import msgspec  # noqa: PLC0415 slow

    from shiwu.backfill.plan import read_rate, read_share, read_window  # noqa: PLC0415 slow

    if window:
        _option("--window", lambda: read_window(window))
    return msgspec.structs.replace(
        base,
        rate=_option("--rate", lambda: read_rate(rate)) if rate else None,
        window=window,
        stop_at_failures=_option("--stop-at-failures", lambda: read_share(stop_at)) if stop_at else None,
    )


def _option(name: str, read: Any) -> Any:
    try:
        return read()
    except ValueError as error:
        raise click.UsageError(f"{name}: {error}") from None


@backfill.command()
@click.argument("name", type=Name())
@click.pass_context
def pause(ctx: click.Context, /, *, name: str) -> None:
    """Send nothing more until `resume`; what was sent goes on."""
    with _session(ctx) as session:
        session.pause(name)


@backfill.command()
@click.argument("name", type=Name())
@click.pass_context
def resume(ctx: click.Context, /, *, name: str) -> None:
    """Send again; where no process runs the backfill, run it here as it was started."""
    with _session(ctx) as session:
        session.resume(name)


@backfill.command()
@click.argument("name", type=Name())
@click.pass_context
def cancel(ctx: click.Context, /, *, name: str) -> None:
    """Send nothing more, answer what waits `cancelled`, and write the results."""
    with _session(ctx) as session:
        session.cancel(name)


@backfill.command()
@click.argument("name", type=Name())
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def status(ctx: click.Context, /, *, name: str, as_json: bool) -> None:
    """Show where a backfill is."""
    with _session(ctx) as session:
        shown = session.status(name)
    if as_json:
        echo_json(to_json(shown))
        return
    _print_fields(shown)


@backfill.command()
@click.argument("name", type=Name())
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all counts.")
@click.pass_context
def report(ctx: click.Context, /, *, name: str, as_json: bool) -> None:
    """Show the counts of a backfill: answers by status and error code, rate, times, models."""
    with _session(ctx) as session:
        shown = session.report(name)
    if as_json:
        echo_json(to_json(shown, indent=2))
        return
    _print_fields(shown)


@backfill.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_command(ctx: click.Context, /, *, as_json: bool) -> None:
    """List all backfills, newest first."""
    with _session(ctx) as session:
        found = session.all()
    if as_json:
        for shown in found:
            echo_json(to_json(shown))
        return
    names = ("backfill", "phase", "answered", "failed", "started_at", "source")
    rows = [Row([str(shown[name]) for name in names]) for shown in found]
    print_rows(names, rows, text_columns=(0, 5), optional=(4, 3))


def _print_fields(fields: dict[str, Any], *, indent: str = "") -> None:
    """Print names and values below each other; empty ones are left out."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            click.echo(f"{indent}{name}:")
            _print_fields(value, indent=f"{indent}  ")
        elif isinstance(value, bool):
            click.echo(f"{indent}{printable(name)}: {'yes' if value else 'no'}")
        elif value not in (None, "", {}, []):
            click.echo(f"{indent}{printable(name)}: {printable(str(value))}")


@contextmanager
def _session(ctx: click.Context) -> Iterator[Session]:
    """The commands on the Redis of this call. What a change of the command line cures ends it as wrong usage."""
    from shiwu.backfill.errors import WrongState  # noqa: PLC0415 slow
    from shiwu.backfill.session import Session  # noqa: PLC0415 slow
    from shiwu.parts import WrongSource, WrongTarget  # noqa: PLC0415 slow

    client: Client = ctx.obj
    url = redis_url_of(ctx)
    try:
        with Session(client, url) as session:
            yield session
    except (WrongState, WrongSource, WrongTarget) as error:
        end(f"{error.code}: {error}", Exit.USAGE)
    except ModuleNotFoundError as error:
        end(f"backfill needs {error.name}: run `pip install '.[backfill]'` in a clone of shiwu", Exit.USAGE)
