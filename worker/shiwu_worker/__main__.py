"""`shiwu-worker`: starts the Celery worker of this machine's device, or checks the settings."""

from __future__ import annotations

import sys

import click
from pydantic import ValidationError

from shiwu_worker.config import Settings
from shiwu_worker.errors import ExitCode


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", is_flag=True, help="Print the effective settings, try Redis, S3 and the model, and exit.")
@click.option("--tune", is_flag=True, help="Measure the model and the loaders, print and keep the settings, and exit.")
@click.option("-E", "--task-events", is_flag=True, help="Send Celery's task events, for Flower and celery-exporter.")
@click.version_option(package_name="shiwu")
def main(*, check: bool, tune: bool, task_events: bool) -> None:
    """Tag pictures from the lanes `shiwu.interactive` and `shiwu.bulk`.

    All settings are environment variables that begin with SHIWU_; --check lists them. The worker is an ordinary Celery
    worker and can as well be started by `celery -A shiwu_worker.app worker`.

    \b
    SIGTERM or Ctrl-C   finish what is claimed within SHIWU_GRACE_S, give back the rest, exit 0
    a second one        give back at once
    """
    if check:
        from shiwu_worker.check import run_checks  # noqa: PLC0415 the model's libraries take seconds to import

        sys.exit(run_checks())
    if tune:
        from shiwu_worker.tune import run_tune  # noqa: PLC0415 as above

        sys.exit(run_tune())
    try:
        Settings()
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in wrong["loc"]).upper()
            click.echo(f"SHIWU_{name}: {wrong['msg']}", err=True)
        sys.exit(int(ExitCode.CONFIG))
    from celery.bin.celery import celery  # noqa: PLC0415 it takes a second to import

    args = ["--quiet", "--app", "shiwu_worker.app", "worker", "--loglevel=WARNING", *(["-E"] if task_events else [])]
    celery.main(args=args, prog_name="celery")


if __name__ == "__main__":
    main()
