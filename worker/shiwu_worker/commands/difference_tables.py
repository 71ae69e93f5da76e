"""Prints what another label set changes, for `labels diff` and `labels shadow`."""

from __future__ import annotations

from typing import Any, Final

import click
from rich.table import Column, Table

from shiwu.contract import printable
from shiwu_worker.commands.console import make_console
from shiwu_worker.jobs.tag_differences import TagDifferences

SHOWN_LABELS: Final = 30


def differences_as_json(found: TagDifferences) -> dict[str, Any]:
    """The counts as one JSON object."""
    return {
        "images": found.images,
        "same": found.same,
        "top1_changed": found.top1,
        **{f"tags_{change}": count for change, count in found.totals().items()},
        "labels": [
            {
                "label": label,
                "same": found.kept[label],
                "added": found.added[label],
                "removed": found.removed[label],
                "images": found.examples.get(label, []),
            }
            for label in found.labels()
        ],
    }


def print_differences(found: TagDifferences) -> None:
    """Print a table of the labels with most changes, and the totals."""
    table = Table("label", "same", "added", "removed", Column("for example", overflow="fold"), box=None)
    labels = found.labels()
    for label in labels[:SHOWN_LABELS]:
        counts = (str(each[label]) for each in (found.kept, found.added, found.removed))
        example = next(iter(found.examples.get(label, [])), "")
        table.add_row(printable(label), *counts, printable(example))
    if labels:
        make_console().print(table)
    if len(labels) > SHOWN_LABELS:
        click.echo(f"{len(labels) - SHOWN_LABELS} labels more; --json has all")
    click.echo(f"{found.images} images: {found.same} with the same tags, {found.top1} with another first tag")
    click.echo("tags: {same} same, {added} added, {removed} removed".format(**found.totals()))
