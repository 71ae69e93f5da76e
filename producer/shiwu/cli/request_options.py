"""Options of the commands that send jobs."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import click

from shiwu.cli.params import Seconds, Threshold
from shiwu.contract import OF_THE_SET, ErrorCode, RequestError, Want

expires_option = click.option(
    "--expires",
    "expires_s",
    type=Seconds(),
    help="Seconds after which a job that has not started is answered `expired`.",
)


def request_options(command: Any) -> Any:
    """Options for labels, head and limits, which a command gets as `labels`, `words` and fields of a request."""
    for option in (
        click.option(
            "--labels", help="Name of a label set, or labels separated by commas; a single label with a comma: 猫,"
        ),
        click.option("--label", "words", multiple=True, metavar="WORD", help="One label of your own; may be repeated."),
        click.option("--top-k", default=5, show_default=True, help="How many tags at most."),
        click.option(
            "--threshold",
            type=Threshold(),
            default=OF_THE_SET,
            show_default=True,
            help="Lowest p, or score, to show, 0 to 1; set, or 0: the limits of the label set.",
        ),
        click.option("--min-cosine", type=float, help="Lowest cosine to show, -1 to 1."),
        click.option("--head", type=click.Choice(["softmax", "sigmoid"]), help="Default: the label set's own."),
        click.option(
            "--want",
            multiple=True,
            type=click.Choice(get_args(Want)),
            default=("tags",),
            show_default=True,
            help="What to return; may be repeated. See docs/vectors.md.",
        ),
        click.option("--callback", help="Webhook that gets the answer: an endpoint's name, or an https URL."),
    ):
        command = option(command)
    return command


def read_labels(labels: str | None, words: Sequence[str]) -> str | list[str] | None:
    """The name of a label set, or a list of labels."""
    if labels is not None and words:
        raise click.UsageError("expected --labels or --label, got both")
    if words:
        return list(words)
    listed = (labels or "").replace("，", ",")
    return [word for word in listed.split(",") if word.strip()] if "," in listed else labels


@contextlib.contextmanager
def with_label_hint(labels: str | list[str] | None) -> Iterator[None]:
    """Add to the error about a label set's name how to send a single label."""
    try:
        yield
    except RequestError as error:
        if error.code is ErrorCode.INVALID_LABELS and isinstance(labels, str) and labels.strip():
            hint = f"for a single label use --label {shlex.quote(labels)}"
            text = f"{error}; {labels!r} was read as the name of a label set: {hint}"
            raise RequestError(error.code, text) from None
        raise
