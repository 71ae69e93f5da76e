"""`shiwu` on the command line: ask, wait, follow, look."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import click
import redis
from pydantic_core import to_json
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shiwu.client import Client
from shiwu.contract import Lane, RequestError, without_query
from shiwu.errors import QueueFull
from shiwu.results import TagResult

BAR_FROM = 500
"""Work on fewer pictures needs no progress bar."""


class Exit(IntEnum):
    """Exit codes; --help lists them."""

    OK = 0
    NOT_TAGGED = 1
    USAGE = 2
    TIMEOUT = 3
    QUEUE = 4


class Commands(click.Group):
    """Turns the errors of all commands into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RequestError as error:
            _end(f"{error.code}: {error}", Exit.USAGE)
        except QueueFull as error:
            _end(f"{error.code}: {error}", Exit.QUEUE)
        except redis.RedisError as error:
            _end(f"redis: {str(error).rstrip(chr(46))}; is SHIWU_REDIS_URL (or --redis-url) right?", Exit.QUEUE)


def _end(message: str, code: Exit) -> None:
    click.echo(f"shiwu: {message}", err=True)
    sys.exit(int(code))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--redis-url", envvar="SHIWU_REDIS_URL", show_envvar=True, help="Default redis://127.0.0.1:6379/0.")
@click.version_option(package_name="shiwu")
@click.pass_context
def main(ctx: click.Context, redis_url: str | None) -> None:
    """Tag pictures in the background.

    \b
    shiwu tag https://example.org/cat.jpg                    ask, wait, show
    shiwu tag s3://pictures/a.jpg --labels 猫,狗,其他         with words of your own
    shiwu enqueue --lane bulk - < references.txt             ask about many, do not wait
    shiwu results --group archive --follow                   read every answer, as JSON lines
    shiwu status                                             what waits, what runs

    \b
    Exit codes: 0 all well, 1 a picture was not tagged, 2 wrong usage, 3 no answer in time,
    4 Redis not reachable or the queue is full.
    """
    ctx.obj = ctx.with_resource(Client(redis_url))


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
        _end(
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
@click.option("--group", default="shiwu-cli", show_default=True, help="Consumer group; each group gets every answer.")
@click.option("--consumer", help="This consumer's name; default host and process.")
@click.option("--follow", is_flag=True, help="Wait for more instead of ending when the stream is read.")
@click.pass_obj
def results(client: Client, /, *, group: str, consumer: str | None, follow: bool) -> None:
    """Print answers of all jobs as JSON lines, and acknowledge each one that was printed."""
    block_s = 2.0 if follow else 0.05
    try:
        for item in client.results(group=group, consumer=consumer, block_s=block_s, stop_when_idle=not follow):
            click.echo(item.result.to_json())
            item.ack()
    except KeyboardInterrupt:
        sys.exit(Exit.OK)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def status(client: Client, /, *, as_json: bool) -> None:
    """Show what waits, what is claimed, and which workers live."""
    state = client.queue_state()
    if as_json:
        click.echo(to_json(state))
        return
    table = Table("lane", "waiting", "claimed", box=None)
    for lane in Lane:
        table.add_row(lane.value, str(state.waiting[lane]), str(state.claimed[lane]))
    console = Console()
    console.print(table)
    console.print(f"delayed {state.delayed}, dead letters {state.dead}, workers {len(state.workers)}", end="")
    console.print(f": {', '.join(state.workers)}" if state.workers else " (none gave a sign of life in 10 s)")


if __name__ == "__main__":
    main()
