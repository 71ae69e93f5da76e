"""`shiwu-worker`: starts the Celery worker of this machine's device, or checks the settings."""

from __future__ import annotations

import sys

import click

from shiwu_worker.errors import ExitCode


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", is_flag=True, help="Print the effective settings, try Redis, S3 and the model, and exit.")
@click.version_option(package_name="shiwu")
def main(*, check: bool) -> None:
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
    try:
        from shiwu_worker import app  # noqa: PLC0415 celery takes a second to import

        celery = app.app
    except ValueError as error:
        click.echo(f"settings: {error}", err=True)
        sys.exit(int(ExitCode.CONFIG))
    sys.exit(celery.worker_main(["--quiet", "worker", "--loglevel=WARNING"]))


if __name__ == "__main__":
    main()
