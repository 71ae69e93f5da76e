"""`shiwu-worker`: starts a Celery worker for each GPU of this machine, or runs a command such as --check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from shiwu.command_output import OutputGroup
from shiwu_worker.commands.label_group import labels
from shiwu_worker.errors import ExitCode
from shiwu_worker.retag.command import retag_command


@click.group(
    "shiwu-worker",
    cls=OutputGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--check",
    is_flag=True,
    help="Try Redis, the label files, S3, GPUs and the model, print the changed settings, and exit.",
)
@click.option("--all", "show_all", is_flag=True, help="With --check: print all settings with their descriptions.")
@click.option("--tune", is_flag=True, help="Measure model and loaders, print and save the best settings, and exit.")
@click.option(
    "--fetch-model",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Download the hub id in SHIWU_MODEL into this folder unless it is complete there, check it, and exit.",
)
@click.option(
    "--convert",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the model in SHIWU_MODEL into this new folder as safetensors, with its adapter merged, and exit.",
)
@click.option("--size", is_flag=True, help="Print the cores, loaders and memory that GPUs need, and exit.")
@click.option(
    "--card",
    metavar="NAME",
    type=click.Choice(["t4", "l4", "a10", "a100", "h100", "h200", "mig-1g", "mig-2g"]),
    help="With --size: t4, l4, a10, a100, h100, h200, mig-1g or mig-2g (slices of an H200).  [default: all]",
)
@click.option(
    "--picture",
    metavar="KIND",
    type=click.Choice(["512px", "2mp", "12mp", "png-2mp", "webp-2mp", "avif-2mp"]),
    help="With --size: 512px, 2mp or 12mp (JPEG), png-2mp, webp-2mp or avif-2mp.  [default: 2mp]",
)
@click.option(
    "--rate",
    metavar="N",
    type=click.FloatRange(0, min_open=True),
    help="With --size: images a second in total.  [default: what one GPU is estimated to do]",
)
@click.option("-E", "--task-events", is_flag=True, help="Send Celery's task events, for Flower and celery-exporter.")
@click.option(
    "--gpus",
    metavar="LIST",
    default="all",
    show_default=True,
    help="The GPUs to use, of those that CUDA_VISIBLE_DEVICES shows: numbers of nvidia-smi, UUIDs (GPU-…, MIG-…) or "
    "prefixes of UUIDs, separated by commas. cpu:0,cpu:1 starts two workers on the CPU.",
)
@click.option(
    "--per-gpu",
    metavar="N",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Workers on each GPU or MIG instance.",
)
@click.version_option(package_name="shiwu")
@click.pass_context
def main(
    context: click.Context,
    *,
    check: bool,
    show_all: bool,
    tune: bool,
    fetch_model: Path | None,
    convert: Path | None,
    size: bool,
    card: str | None,
    picture: str | None,
    rate: float | None,
    task_events: bool,
    gpus: str,
    per_gpu: int,
) -> None:
    """Tag images from the lanes `shiwu.interactive` and `shiwu.bulk`, unless a command is given.

    All settings are environment variables that begin with SHIWU_; --check --all lists them. With several GPUs, a
    launcher starts one worker for each and restarts a worker that crashes. With one GPU or none, this process is the
    worker: an ordinary Celery worker, which `celery -A shiwu_worker.app worker` starts too.

    \b
    SIGTERM or Ctrl-C   finish claimed jobs within SHIWU_GRACE_S, release the rest, exit 0
    a second signal     release all jobs immediately
    SIGHUP              read the label sets of SHIWU_LABELS_DIR again; without that folder like SIGTERM

    \b
    exit codes
    64 CONFIG    a setting or an option is wrong
    65 MODEL     the model did not load or did not warm up
    66 LOADERS   the loader processes crash repeatedly
    67 DEVICE    the context of the GPU is corrupted
    68 CANARY    the health-check image got a wrong result: the device computes wrong
    69 GAVE_UP   several GPUs: the worker of one GPU crashed too often
    70 INTERNAL  a defect of shiwu
    71 OVERDUE   several GPUs: a worker was killed before it had drained
    74 OUTPUT    what a command prints cannot be written, as on a full disk
    130          Ctrl-C interrupted a command such as --check, or the start before anything is loaded
    """
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"expected no options before the command {context.invoked_subcommand}")
        return
    if show_all and not check:
        raise click.UsageError("expected --all with --check")
    if sum(map(bool, (check, tune, fetch_model, convert, size))) > 1:
        raise click.UsageError("expected only one of --check, --tune, --fetch-model, --convert and --size")
    if not size and (card or picture or rate):
        raise click.UsageError("expected --card, --picture and --rate with --size")
    if size:
        from shiwu_worker.commands.size import run_size  # noqa: PLC0415 --help needs none of its imports

        sys.exit(run_size(card=card, picture=picture or "2mp", rate=rate))
    with _worker_libraries():
        command = _command(check=check, show_all=show_all, tune=tune, fetch_model=fetch_model, convert=convert)
        if command is None:
            command = _worker_command(gpus=gpus, per_gpu=per_gpu, task_events=task_events)
    sys.exit(command())


main.add_command(labels)
main.add_command(retag_command)


@main.group()
def model() -> None:
    """Commands for models."""


@model.command()
@click.argument("model", metavar="[FOLDER|ID]", required=False)
@click.option("--labels", metavar="NAME", help="The label set to check and to answer with.  [default: the default set]")
@click.option(
    "--image",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The image to answer.  [default: a photograph in the package]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(*, model: str | None, labels: str | None, image: Path | None, as_json: bool) -> None:
    """Show what a model is, whether the worker can use it, and its answer next to that of the reference script.

    Without an argument it inspects SHIWU_MODEL, or the embedded model. The exit code is 0 if the worker can use the
    model, and otherwise that of the worker: 65 for the model, 64 for a setting or an option. The reference script
    holds a second copy of the weights, in FP32 on the CPU.
    """
    with _worker_libraries():
        from shiwu_worker.commands.model_inspect import run_inspect  # noqa: PLC0415 --help needs none of its imports
    sys.exit(run_inspect(model, labels=labels, image=image, as_json=as_json))


def _command(
    *, check: bool, show_all: bool, tune: bool, fetch_model: Path | None, convert: Path | None
) -> Callable[[], int] | None:
    """Return the command that replaces the worker, or None. Imports are local, because each takes seconds."""
    if check:
        from shiwu_worker.celery_worker.callback_app import check_callbacks  # noqa: PLC0415 as the docstring says
        from shiwu_worker.commands.check import run_checks  # noqa: PLC0415 as the docstring says

        return lambda: run_checks(show_all=show_all, check_callbacks=check_callbacks)
    if tune:
        from shiwu_worker.commands.tune import run_tune  # noqa: PLC0415 as the docstring says

        return run_tune
    if fetch_model:
        from shiwu_worker.commands.model_commands import run_fetch  # noqa: PLC0415 as the docstring says

        return lambda: run_fetch(fetch_model)
    if convert:
        from shiwu_worker.commands.model_commands import run_convert  # noqa: PLC0415 as the docstring says

        return lambda: run_convert(convert)
    return None


def _worker_command(*, gpus: str, per_gpu: int, task_events: bool) -> Callable[[], int]:
    """Return the call that starts the workers. Imports are local, because --help needs none of them."""
    from shiwu_worker.celery_worker import process  # noqa: PLC0415 as the docstring says
    from shiwu_worker.launcher.start import start_workers  # noqa: PLC0415 as the docstring says

    return lambda: start_workers(
        process.begin(),
        gpus=gpus,
        per_gpu=per_gpu,
        run=partial(process.run, task_events=task_events),
        command=partial(process.command, task_events=task_events),
    )


@contextmanager
def _worker_libraries() -> Iterator[None]:
    """End the process with an explanation if only the producer's side is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "shiwu").partition(".")[0] in {"shiwu", "shiwu_worker"}:
            raise  # a defect of shiwu, not a missing library
        click.echo(
            f"shiwu-worker: expected the worker's libraries, but {error.name} is not installed (only the producer's "
            "side of shiwu is): run `pip install '.[worker]'` in a clone of shiwu",
            err=True,
        )
        sys.exit(int(ExitCode.CONFIG))


if __name__ == "__main__":
    main()
