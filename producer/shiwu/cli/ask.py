"""The commands that send jobs: tag, enqueue and cancel."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import click
import redis
from rich.console import Console
from rich.progress import Progress

from shiwu.broker.queue_stats import WORKER_TIMEOUT_MS
from shiwu.cli.base import Exit, end, main
from shiwu.cli.hints import notes_of
from shiwu.cli.params import Seconds
from shiwu.cli.request_options import expires_option, read_labels, request_options, with_label_hint
from shiwu.cli.terminal import Row, echo_data, echo_json, print_rows
from shiwu.client.client import Client
from shiwu.client.results import TagResult
from shiwu.contract import ErrorCode, RequestError, without_query
from shiwu.errors import ShiwuError

PROGRESS_BAR_FROM: Final = 500
"""Fewer images than this get no progress bar."""
WORKER_CHECK_AFTER_S: Final = 3.0
"""After this time without an answer, `shiwu tag` checks whether a worker runs."""
HEADINGS: Final = ("image", "tags", "queue", "fetch", "decode", "batch", "encode", "total ms")


@main.command()
@click.argument("references", nargs=-1, required=True, metavar="REF…")
@request_options
@expires_option
@click.option("--lane", type=click.Choice(["interactive", "bulk"]), default="interactive", show_default=True)
@click.option(
    "--timeout", "timeout_s", type=Seconds(), default=60.0, show_default=True, help="Seconds to wait for all answers."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON answer a line, as they come.")
@click.pass_obj
def tag(
    client: Client,
    /,
    *,
    references: tuple[str, ...],
    labels: str | None,
    words: tuple[str, ...],
    lane: str,
    expires_s: float | None,
    timeout_s: float,
    threshold: float,
    as_json: bool,
    **fields: Any,
) -> None:
    """Tag images: enqueue them, wait for the answers, and show tags and times.

    REF is s3://bucket/key, https://…, http://… or file:///… (where the worker allows the folder).
    """
    fields["labels"] = read_labels(labels, words)
    # The table also shows the best label where none reaches the threshold, so the worker applies no threshold. That of
    # a label set may compare probabilities, which only the worker knows.
    is_applied_here = isinstance(fields["labels"], list) and not as_json and 0 <= threshold <= 1
    fields["threshold"] = 0.0 if is_applied_here else threshold
    with with_label_hint(fields["labels"]):
        ids = list(client.enqueue_many(references, lane=lane, expires_s=expires_s, **fields))
    found: dict[str, TagResult] = {}
    for job_id, result in _with_bar(_answers(client, ids, timeout_s=timeout_s), len(ids), "answers"):
        found[job_id] = result
        if as_json:
            echo_json(result.to_json())
    if not as_json:
        warned: set[str] = set()
        shown = [(ref, found.get(job_id)) for ref, job_id in zip(references, ids, strict=True)]
        print_rows(
            HEADINGS,
            [_row(ref, result, threshold if is_applied_here else 0.0, warned=warned) for ref, result in shown],
            text_columns=(0, 1),
            optional=(5, 2, 3, 4, 6),
        )
    if len(found) < len(ids):
        first = next(job_id for job_id in ids if job_id not in found)
        end(
            f"wait_timeout: {len(ids) - len(found)} of {len(ids)} answers did not come in {timeout_s:g} s; the jobs go "
            f"on, and `shiwu explain {first}` says where the first one is",
            Exit.TIMEOUT,
        )
    sys.exit(Exit.OK if all(result.ok for result in found.values()) else Exit.NOT_TAGGED)


def _answers(client: Client, ids: Sequence[str], *, timeout_s: float) -> Iterator[tuple[str, TagResult]]:
    """Yield answers as they come; warn on standard error if some are late and no worker runs."""
    began_s = time.monotonic()
    missing = dict.fromkeys(ids)
    for job_id, result in client.as_answered(ids, timeout_s=min(timeout_s, WORKER_CHECK_AFTER_S)):
        del missing[job_id]
        yield job_id, result
    left_s = timeout_s - (time.monotonic() - began_s)
    if not missing or left_s <= 0:
        return
    with contextlib.suppress(redis.RedisError):  # the wait goes on while Redis is away
        if not client.running_workers():
            click.echo(
                f"shiwu: no worker has been seen for {WORKER_TIMEOUT_MS / 1000:g} s; start one with `shiwu-worker` on "
                f"the same Redis. Still waiting, up to {left_s:.0f} s.",
                err=True,
            )
    left_s = timeout_s - (time.monotonic() - began_s)
    yield from client.as_answered(missing, timeout_s=max(0.0, left_s))


def _row(reference: str, result: TagResult | None, threshold: float, *, warned: set[str]) -> Row:
    """The row of one image: its tags or its error code, and its times.

    Args:
        warned: warnings of the rows above; they are not repeated, because most apply to all images of a call.
    """
    image = without_query(reference)
    if result is None:
        return Row([image, "no answer yet", *["–"] * (len(HEADINGS) - 2)])
    timing = result.timing
    times = [
        "–" if time_ms is None else f"{time_ms:.1f}"
        for time_ms in (timing.queue, timing.fetch, timing.decode, timing.batch, timing.encode, timing.total)
    ]
    if not result.ok:
        code = str(result.error.code) if result.error else str(result.status)
        return Row([image, code, *times], notes=notes_of(result.error), red=1)
    tags = [
        f"{tag.label} {tag.score:.3f}" if tag.p is None else f"{tag.label} p {tag.p:.3f}" for tag in result.tags or ()
    ]
    kept = [text for text, tag in zip(tags, result.tags or (), strict=True) if tag.score >= threshold]
    notes = []
    if not kept and result.tags is not None:
        best = f"of {threshold:g}; the best one is {tags[0]}" if tags else "of the request or its label set"
        notes = [f"no tag reached the threshold {best}"]
    new = [warning.message for warning in result.warnings or () if warning.message not in warned]
    warned.update(new)
    notes += [f"warning: {message}" for message in new]
    return Row([image, "  ".join(kept) or "–", *times], notes=notes)


@main.command()
@click.argument("references", nargs=-1, metavar="REF…|-")
@request_options
@expires_option
@click.option("--lane", type=click.Choice(["interactive", "bulk"]), default="bulk", show_default=True)
@click.option("--from-file", type=click.File("rb"), help="One reference a line, in UTF-8.")
@click.option(
    "--id-from",
    type=click.Choice(["reference"]),
    help="Derive ids from the reference and the options above: a second run adds no jobs. Default: random ids.",
)
@click.option(
    "--limit",
    "max_waiting",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="How many messages the lane may hold.",
)
@click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Wait while the lane is full or Redis is unavailable."
)
@click.pass_obj
def enqueue(
    client: Client,
    /,
    *,
    references: tuple[str, ...],
    labels: str | None,
    words: tuple[str, ...],
    lane: str,
    expires_s: float | None,
    from_file: Any,
    wait: bool,
    **fields: Any,
) -> None:
    """Enqueue images and print the job ids, without waiting for answers.

    `-` reads references from standard input, one a line; empty lines and lines that begin with # are skipped. A line
    may begin with an id of your own and a tab. An id that is enqueued again is answered once only.

    The command waits while the lane is full. Ctrl-C ends it, and prints how many jobs were enqueued.
    """
    if bool(references) == (from_file is not None):
        raise click.UsageError("expected references, - or --from-file, and only one of them")
    if references == ("-",):
        if sys.stdin is None:
            raise click.UsageError("expected references on standard input, but it is closed")
        from_file = sys.stdin.buffer
    lines = None if from_file is None else _Lines(from_file)
    fields["labels"] = read_labels(labels, words)
    with with_label_hint(fields["labels"]):
        client.server_time_ms()  # fails now if the address is wrong, because enqueue_many would wait
        wait_s = math.inf if wait else 0.0
        ids = client.enqueue_many(lines or references, lane=lane, expires_s=expires_s, wait_s=wait_s, **fields)
        ids = ids if lines is None else lines.name_errors(ids)
        _print_ids(_with_bar(ids, len(references) if lines is None else None, "enqueued"))


def _print_ids(ids: Iterable[str]) -> None:
    count = 0
    try:
        for job_id in ids:
            echo_data(job_id)
            count += 1
    except KeyboardInterrupt:
        end(
            f"interrupted; {count} ids were printed, and one more portion may have been enqueued. With ids of your own "
            "or --id-from reference a second run enqueues nothing twice",
            Exit.INTERRUPTED,
        )
    except (RequestError, ShiwuError, redis.RedisError):
        if count:
            click.echo(f"shiwu: {count} ids were printed before this error", err=True)
        raise


class _Lines:
    """The references of a file, some with ids. Errors about one of them name its line."""

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source = source
        self._unsent: deque[int] = deque()
        """The numbers of the lines that were read and are not sent."""

    def __iter__(self) -> Iterator[str | dict[str, str]]:
        for number, line in enumerate(self._source, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                text = f"line {number}: expected UTF-8 ({error.reason}); save the list as UTF-8"
                raise RequestError(ErrorCode.INVALID_REFERENCE, text) from None
            if not text or text.startswith("#"):
                continue
            self._unsent.append(number)
            job_id, tab, reference = text.partition("\t")
            yield {"id": job_id, "image": reference.strip()} if tab else text

    def name_errors(self, ids: Iterable[str]) -> Iterator[str]:
        """Yield the ids of these lines, which come in their order.

        Raises:
            RequestError: a line is invalid.
        """
        try:
            for job_id in ids:
                self._unsent.popleft()
                yield job_id
        except RequestError as error:
            # Other fields than the reference and the id are those of all lines.
            if error.item is None or error.code not in {ErrorCode.INVALID_REFERENCE, ErrorCode.INVALID_ID}:
                raise
            raise RequestError(error.code, f"line {self._unsent[error.item]}: {error}") from None


def _with_bar(items: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
    """Yield the items, with a progress bar if there are many and standard error is a terminal."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = is_terminal and (total is None or total >= PROGRESS_BAR_FROM)
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield from progress.track(items, total=total, description=what)


@main.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID…")
@click.option("--reason", default="", help="Appears in the error of the answer.")
@click.pass_obj
def cancel(client: Client, /, *, ids: tuple[str, ...], reason: str) -> None:
    """Answer jobs `cancelled` now; print the ids that had no answer before."""
    for job_id in client.cancel(ids, reason=reason):
        echo_data(job_id)
