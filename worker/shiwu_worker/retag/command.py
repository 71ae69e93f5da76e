"""The options of `shiwu-worker retag`. Imports nothing heavy, because `--help` of the worker needs this module."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import click

from shiwu.contract import RequestError, printable
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.retag.label_process import prepare_labels
from shiwu_worker.retag.options import RetagOptions, request_of


@click.command("retag")
@click.option(
    "--vectors",
    required=True,
    metavar="FOLDER|FILE|s3://…",
    help="The Parquet parts that `shiwu vectors sink` wrote, or one of them.",
)
@click.option("--labels", required=True, metavar="FILE|NAME", help="The new label set: a YAML file, or a worker's set.")
@click.option("--out", required=True, metavar="FILE|s3://…", help="Answers as JSON lines; - is standard output.")
@click.option("--model", metavar="FOLDER|ID", help="The model of the vectors.  [default: SHIWU_MODEL]")
@click.option(
    "--diff", metavar="FILE|NAME", help="An older label set: print for each label what changes, with examples."
)
@click.option("--examples-out", metavar="FILE", help="With --diff: the examples as JSON lines for `shiwu gallery`.")
@click.option("--top-k", default=5, show_default=True, help="How many tags at most.")
@click.option("--threshold", default=0.0, show_default=True, help="Lowest score of a tag, 0 to 1.")
@click.option("--min-cosine", type=float, help="Lowest cosine of a tag, -1 to 1.  [default: those of the label set]")
@click.option("--head", type=click.Choice(["softmax", "sigmoid"]), help="[default: the label set's own]")
@click.option("--skip-other-models", "is_skipping", is_flag=True, help="Leave out vectors of other models.")
def retag_command(**options: Any) -> None:
    """Give kept vectors the tags of a new label set. No image is read, and no GPU is needed.

    The tags are those that a worker gives to a new job that wants its vector, to the fifth decimal. Vectors of another
    model or revision are refused. Needs the extra `vectors`.
    """
    if options["examples_out"] and not options["diff"]:
        raise click.UsageError("expected --examples-out with --diff")
    try:
        sys.exit(int(_run(RetagOptions(**options))))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"shiwu", "shiwu_worker"}:
            raise  # a defect of shiwu, not a missing library
        click.echo(f"retag needs {error.name}: run `pip install '.[worker,vectors]'` in a clone of shiwu", err=True)
        sys.exit(int(ExitCode.CONFIG))


def _run(options: RetagOptions) -> ExitCode:
    """Encode the labels, then score; the imports stand between, because each needs its memory."""
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError(name="pyarrow")
    try:
        request = request_of(options)
        prepared = prepare_labels(options)
        from shiwu_worker.retag.label_texts import Failure  # noqa: PLC0415 as the docstring says
        from shiwu_worker.retag.run import retag  # noqa: PLC0415 as the docstring says

        if isinstance(prepared, Failure):
            raise FatalError(prepared.code, prepared.message)
        retag(options, prepared, request)
    except RequestError as error:
        return _failed(ExitCode.CONFIG, printable(str(error)))
    except FatalError as error:
        return _failed(error.exit_code, str(error))
    return ExitCode.OK


def _failed(code: ExitCode, message: str) -> ExitCode:
    click.echo(f"{code.name}: {message}", err=True)
    return code
