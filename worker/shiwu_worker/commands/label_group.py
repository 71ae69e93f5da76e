"""The commands `shiwu-worker labels`: their options. Imports of the model's libraries are local; they take seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

if TYPE_CHECKING:
    from shiwu_worker.commands.folder_images import ImageSource

ANSWERS_HELP = "Answers with vectors as JSON lines; - reads standard input."
IMAGES_HELP = "A folder of images, which are encoded here. In truth, images may be named by their paths in it."
TRUTH_HELP = 'JSON lines {"image": reference, "labels": [label, …]}.  [default: `labels` in the metadata of the jobs]'


def image_options(command: Any) -> Any:
    """Options for the images of a command, of which it needs one: `answers` and `folder`."""
    for option in (
        click.option("--answers", type=click.File("rb"), help=ANSWERS_HELP),
        click.option(
            "--images",
            "folder",
            metavar="FOLDER",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help=IMAGES_HELP,
        ),
    ):
        command = option(command)
    return command


def _source(answers: BinaryIO | None, folder: Path | None) -> ImageSource:
    from shiwu_worker.commands.folder_images import ImageSource  # noqa: PLC0415 as the module's docstring says

    if (answers is None) is (folder is None):
        raise click.UsageError("expected either --answers or --images")
    return ImageSource(answers, folder)


@click.group()
def labels() -> None:
    """Commands for label sets: check one, choose its limits from images, and measure it on images with known labels.

    \b
    The images are a folder (--images), or answers with vectors, in JSON lines:
    shiwu enqueue --want vector --lane bulk - < references.txt
    shiwu results --group calibration > answers.jsonl
    """


@labels.command()
@click.argument("names", metavar="[NAME…]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def lint(*, names: Sequence[str], as_json: bool) -> None:
    """Find labels that the model cannot read or cannot tell apart, and limits that were chosen for another model or
    for other texts (calibration_stale). Exit code 1 if there are any.

    Also shows pairs of labels whose vectors are near each other, which is a hint only. Without names all label sets
    are checked: those of the package and of SHIWU_LABELS_DIR.
    """
    from shiwu_worker.commands.label_lint import run_lint  # noqa: PLC0415 as the module's docstring says

    sys.exit(run_lint(names, as_json=as_json))


@labels.command()
@click.argument("name", metavar="NAME")
@image_options
@click.option(
    "--false-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    required=True,
    help="Share of images without any of the labels that may get a tag, such as 0.02.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The label file to write."
)
@click.option("--name", "new_name", metavar="NEW", help="Name of the new set.  [default: NAME-calibrated]")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the sources that are kept aside.")
@click.option("--accept", is_flag=True, help="Write limits that do not hold on the images kept aside.")
@click.option(
    "--labelled",
    type=click.File("rb"),
    help='JSON lines {"image": reference, "labels": [label, …]} of images with known labels, for probabilities.',
)
@click.option(
    "--precision",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of true tags to choose a threshold of each label for, from --labelled.",
)
def calibrate(
    *,
    name: str,
    answers: BinaryIO | None,
    folder: Path | None,
    false_rate: float,
    output: Path,
    new_name: str | None,
    seed: int,
    accept: bool,
    labelled: BinaryIO | None,
    precision: float | None,
) -> None:
    """Choose the least cosine of each label, so that images which show none of the labels rarely get a tag.

    The images should be like those that the set will meet, and from several sources: folders, buckets, customers (the
    part of the reference before the last slash, or `source` in the metadata of a job). A third is kept aside by source,
    and what the limits do there is printed and stored. Exit code 1: too few images, or the limits do not hold there.

    For a set of version 2 with head: z this writes its calibration file: one z for all labels, and with --labelled the
    probability of each label that 20 of these images show. Images that show a label are no background.
    """
    if precision is not None and labelled is None:
        raise click.UsageError("expected --labelled with --precision")
    from shiwu_worker.commands.label_commands import run_calibrate  # noqa: PLC0415 as the module's docstring says

    sys.exit(
        run_calibrate(
            name,
            _source(answers, folder),
            false_rate=false_rate,
            output=output,
            new_name=new_name,
            seed=seed,
            is_forced=accept,
            labelled=labelled,
            precision=precision,
        )
    )


@labels.command("eval")
@click.argument("name", metavar="NAME")
@image_options
@click.option("--truth", type=click.File("rb"), help=TRUTH_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--report",
    "report_folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also write report.html there, with curves and the images of the worst mistakes.",
)
def evaluate(
    *,
    name: str,
    answers: BinaryIO | None,
    folder: Path | None,
    truth: BinaryIO | None,
    as_json: bool,
    report_folder: Path | None,
) -> None:
    """Measure a label set on images with known labels: precision, recall, confusions and false tags, with intervals.

    --report needs the extra `report`. It fetches images once more, as `shiwu gallery` does, with the access rules and
    in the sandbox of a worker. The page is one file that loads nothing.
    """
    from shiwu_worker.commands.label_commands import run_eval  # noqa: PLC0415 as the module's docstring says

    sys.exit(run_eval(name, _source(answers, folder), truth=truth, as_json=as_json, report_folder=report_folder))


@labels.command("tune-templates")
@click.argument("name", metavar="NAME")
@image_options
@click.option("--labelled", type=click.File("rb"), metavar="MANIFEST", help=TRUTH_HELP)
@click.option("--template", "more", multiple=True, metavar="TEXT", help="One more candidate, with {} for the label.")
@click.option("-o", "--out", "output", type=click.Path(dir_okay=False, path_type=Path), help="The label file to write.")
@click.option("--name", "new_name", metavar="NEW", help="Name of the new set.  [default: NAME-tuned]")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the sources that are kept aside.")
@click.option("--accept", is_flag=True, help="Write templates that are no better on the images kept aside.")
def tune_templates(
    *,
    name: str,
    answers: BinaryIO | None,
    folder: Path | None,
    labelled: BinaryIO | None,
    more: Sequence[str],
    output: Path | None,
    new_name: str | None,
    seed: int,
    accept: bool,
) -> None:
    """Choose the templates of a label set by measurement, out of a dozen Chinese sentences and those of --template.

    Templates are chosen on one half of the images, one by one, by the mean average precision of the labels. The other
    half, of other sources, is kept aside and shows whether they help. Exit code 1: they do not.
    """
    from shiwu_worker.commands.label_commands import run_tune_templates  # noqa: PLC0415 as the module's docstring says

    if wrong := [template for template in more if template.count("{}") != 1]:
        raise click.BadParameter(f"expected one {{}} in the text, got {wrong[0]!r}", param_hint="--template")
    sys.exit(
        run_tune_templates(
            name,
            _source(answers, folder),
            truth=labelled,
            more=more,
            output=output,
            new_name=new_name,
            seed=seed,
            is_forced=accept,
        )
    )


@labels.command()
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
@image_options
@click.option("--top-k", type=click.IntRange(1, 1000), default=5, show_default=True, help="Most tags of an image.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff(*, old: str, new: str, answers: BinaryIO | None, folder: Path | None, top_k: int, as_json: bool) -> None:
    """Compare the tags that two label sets give to images: which are the same, added and removed, label by label.

    A and B are names of label sets, or YAML files.
    """
    from shiwu_worker.commands.label_diff import run_diff  # noqa: PLC0415 as the module's docstring says

    sys.exit(run_diff(old, new, _source(answers, folder), top_k=top_k, as_json=as_json))


@labels.command()
@click.argument("log", type=click.File("rb"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def shadow(*, log: BinaryIO, as_json: bool) -> None:
    """Add up what workers with SHIWU_SHADOW have logged: which tags the other label set changes, label by label.

    LOG is a file with the log lines of workers as JSON; - reads standard input. Lines of several workers may be mixed.
    Exit code 1: there is no such line.
    """
    from shiwu_worker.commands.label_shadow import run_shadow  # noqa: PLC0415 as the module's docstring says

    sys.exit(run_shadow(log, as_json=as_json))
