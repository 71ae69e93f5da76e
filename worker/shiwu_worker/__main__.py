"""`shiwu-worker`: starts a Celery worker for each GPU of this machine, or runs a command such as --check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from shiwu_worker.errors import ExitCode


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--check", is_flag=True, help="Try Redis, the label files, S3 and the model, print the changed settings, and exit."
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
def main(
    *,
    check: bool,
    show_all: bool,
    tune: bool,
    fetch_model: Path | None,
    convert: Path | None,
    task_events: bool,
    gpus: str,
    per_gpu: int,
) -> None:
    """Tag images from the lanes `shiwu.interactive` and `shiwu.bulk`.

    All settings are environment variables that begin with SHIWU_; --check --all lists them. With several GPUs, a
    launcher starts one worker for each and restarts a worker that crashes. With one GPU or none, this process is the
    worker: an ordinary Celery worker, which `celery -A shiwu_worker.app worker` starts too.

    \b
    SIGTERM or Ctrl-C   finish claimed jobs within SHIWU_GRACE_S, release the rest, exit 0
    a second signal     release all jobs immediately

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
    """
    if show_all and not check:
        raise click.UsageError("expected --all with --check")
    if sum(map(bool, (check, tune, fetch_model, convert))) > 1:
        raise click.UsageError("expected only one of --check, --tune, --fetch-model and --convert")
    with _worker_libraries():
        command = _command(check=check, show_all=show_all, tune=tune, fetch_model=fetch_model, convert=convert)
        if command is None:
            command = _worker_command(gpus=gpus, per_gpu=per_gpu, task_events=task_events)
    sys.exit(command())


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
