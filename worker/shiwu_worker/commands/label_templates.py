"""`shiwu-worker labels tune-templates`: measures templates for a label set, prints them, and writes the better set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.table import Table

from shiwu_worker.calibration import CalibrationError
from shiwu_worker.calibration.templates import CANDIDATES, KnownImages, TemplateRow, TunedTemplates, tune_templates
from shiwu_worker.commands.answer_vectors import AnswerVectors
from shiwu_worker.commands.console import make_console

if TYPE_CHECKING:
    from shiwu_worker.calibration import Interval
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels


def measure_templates(
    label_set: LabelSet,
    encode: Callable[[LabelSet], EncodedLabels],
    read: AnswerVectors,
    shown: Sequence[Collection[str]],
    *,
    more: Sequence[str],
    seed: int,
) -> TunedTemplates:
    """Encode the labels in each template, and choose.

    Args:
        shown: the labels that each image shows.
        more: templates beside those of the package and of the set.

    Raises:
        CalibrationError: there are too few images.
    """
    templates = dict.fromkeys([*label_set.templates, *more, *CANDIDATES])
    vectors = {
        template: encode(replace(label_set, name=None, templates=(template,), min_cosines=None)).vectors
        for template in templates
    }
    is_true = np.array([[word in labels for word in label_set.words] for labels in shown], bool)
    images = KnownImages(read.vectors, is_true, read.pool().sources)
    try:
        return tune_templates(images, vectors, own=label_set.templates, seed=seed)
    except ValueError as error:
        raise CalibrationError(str(error)) from error


def file_with_templates(label_set: LabelSet, templates: Sequence[str], *, name: str) -> dict[str, Any]:
    """The label set with other templates, as the content of its file. Limits of the old templates are left out."""
    fields: dict[str, Any] = {
        "name": name,
        "description": f"{label_set.name} with templates that were chosen by measurement",
        "head": label_set.head,
        "templates": list(templates),
        "labels": list(label_set.words),
    }
    optional = {"scale": label_set.scale, "bias": label_set.bias}
    return fields | {key: value for key, value in optional.items() if value is not None}


def print_templates(found: TunedTemplates, label_set: LabelSet) -> None:
    """The table of templates, and what those of the set and the chosen ones do on both halves."""
    table = Table("templates", "AP", "first right", "AP aside", "first right aside", box=None)
    for row in sorted(found.single, key=lambda row: -row.chosen_on.average_precision):
        table.add_row(row.templates[0], *_cells(row))
    make_console().print(table)
    aside = "other sources" if found.is_by_source else "the same source"
    click.echo(f"chosen on {found.images} images; {found.images_aside} of {aside} kept aside; intervals of 95 %")
    for title, row in ((f"{label_set.name} has", found.own), ("chosen", found.chosen)):
        half, other = row.chosen_on, row.aside
        click.echo(f"{title}: {' '.join(row.templates)}")
        click.echo(f"  chosen on:  AP {half.average_precision:.3f}, first right {_percent(half.first_right)}")
        click.echo(f"  kept aside: AP {other.average_precision:.3f}, first right {_percent(other.first_right)}")
    click.echo(f"of those kept aside, the first label becomes right for {found.gained}, and wrong for {found.lost}")


def not_better(label_set: LabelSet) -> str:
    """Why nothing is written."""
    return f"on the images kept aside these templates are no better than those that {label_set.name} has"


def _cells(row: TemplateRow) -> list[str]:
    qualities = (row.chosen_on, row.aside)
    shares = ("none" if each.first_right is None else f"{each.first_right.share:.1%}" for each in qualities)
    return [
        cell for each, share in zip(qualities, shares, strict=True) for cell in (f"{each.average_precision:.3f}", share)
    ]


def _percent(interval: Interval | None) -> str:
    return "none" if interval is None else f"{interval.share:.1%} ({interval.low:.1%} to {interval.high:.1%})"
