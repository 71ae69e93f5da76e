"""The command `shiwu-hooks`: posts each answer to the endpoints that want it."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import redis

from shiwu.command_output import OutputCommand
from shiwu.contract import printable
from shiwu.errors import RedisUrlError, ShiwuError

if TYPE_CHECKING:
    from shiwu.hooks.process import HooksOptions

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"
EXIT_CONFIG: Final = 64
EXIT_INTERNAL: Final = 70


def end(message: str, code: int) -> NoReturn:
    """Print the reason in one line, and exit."""
    click.echo(f"shiwu-hooks: {printable(message)}", err=True)
    sys.exit(code)


@click.command(
    "shiwu-hooks", cls=OutputCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option("--redis-url", envvar="SHIWU_REDIS_URL", default=DEFAULT_URL, show_envvar=True, help="Redis or Valkey.")
@click.option(
    "--endpoints",
    "file",
    envvar="SHIWU_HOOKS_FILE",
    show_envvar=True,
    required=True,
    type=click.Path(path_type=Path),
    help="YAML file of the endpoints.",
)
@click.option("--group", envvar="SHIWU_HOOKS_GROUP", default="hooks", show_envvar=True, help="Consumer group.")
@click.option(
    "--consumer",
    envvar="SHIWU_HOOKS_CONSUMER",
    show_envvar=True,
    help="Name of this process in the group; keep it over restarts.  [default: name of the machine]",
)
@click.option("--from-beginning", is_flag=True, help="Let a new group get the answers that are in the stream already.")
@click.option(
    "--urls/--no-urls", envvar="SHIWU_HOOKS_URLS", show_envvar=True, help="Let requests give URLs, as `urls` says."
)
@click.option(
    "--schedule",
    envvar="SHIWU_HOOKS_SCHEDULE",
    show_envvar=True,
    default="0s,5s,5m,30m,2h,5h,10h",
    help="Pause before each try.",
)
@click.option(
    "--timeout",
    "timeout_s",
    envvar="SHIWU_HOOKS_TIMEOUT_S",
    show_envvar=True,
    default=15.0,
    type=click.FloatRange(0.1, 60),
    help="Seconds for one try in all.",
)
@click.option(
    "--lease",
    "lease_s",
    envvar="SHIWU_HOOKS_LEASE_S",
    show_envvar=True,
    default=60.0,
    type=click.FloatRange(0.5, 600),
    help="Seconds after which another process makes the deliveries of a crashed one; longer than --timeout.",
)
@click.option(
    "--in-flight",
    envvar="SHIWU_HOOKS_IN_FLIGHT",
    show_envvar=True,
    default=8,
    type=click.IntRange(1, 1000),
    help="Tries at one endpoint at a time.",
)
@click.option(
    "--threads",
    envvar="SHIWU_HOOKS_THREADS",
    show_envvar=True,
    default=32,
    type=click.IntRange(1, 1000),
    help="Tries at a time in all.",
)
@click.option(
    "--max-pending",
    envvar="SHIWU_HOOKS_MAX_PENDING",
    show_envvar=True,
    default=10_000,
    type=click.IntRange(1),
    help="Deliveries that may wait for one endpoint.",
)
@click.option(
    "--max-dead",
    envvar="SHIWU_HOOKS_MAX_DEAD",
    show_envvar=True,
    default=10_000,
    type=click.IntRange(1),
    help="Dead deliveries that are kept.",
)
@click.option(
    "--metrics-port",
    envvar="SHIWU_HOOKS_METRICS_PORT",
    show_envvar=True,
    type=click.IntRange(1, 65535),
    help="Serve Prometheus metrics on this port.",
)
@click.option("--metrics-host", default="0.0.0.0", help="Address of that port.")  # noqa: S104 Prometheus scrapes it from outside
@click.option("--check", is_flag=True, help="Read the file, try Redis, look every endpoint up, and exit.")
@click.version_option(package_name="shiwu")
def main(
    *,
    check: bool,
    metrics_port: int | None,
    metrics_host: str,
    **given: Any,
) -> None:
    """Post each answer to the endpoints of a YAML file that want it, signed, with retries. See docs/webhooks.md.

    Addresses must be public unless SHIWU_ALLOW_HOSTS or SHIWU_ALLOW_NETWORKS allow them; SHIWU_ONLY_HOSTS,
    SHIWU_DENY_HOSTS, SHIWU_DENY_NETWORKS, SHIWU_NAT64_PREFIXES, SHIWU_FETCH_PORTS and SHIWU_PROXY_URL have the meaning
    that they have for workers.

    \b
    SIGTERM or Ctrl-C   finish the tries under way, exit 0
    exit codes          0 stopped, 2 wrong usage, 64 the file, a variable or Redis' URL is wrong, 70 a defect,
                        74 the output cannot be written, 130 interrupted by Ctrl-C before the start
    """
    try:
        options = _options(**given)
    except ModuleNotFoundError as error:
        end(f"needs {error.name}: run `pip install '.[hooks]'` in a clone of shiwu", EXIT_CONFIG)
    except ValueError as error:
        end(str(error), EXIT_CONFIG)
    try:
        sys.exit(_check(options) if check else _run(options, host=metrics_host, port=metrics_port))
    except RedisUrlError as error:
        end(f"{error.code}: SHIWU_REDIS_URL or --redis-url: {error}", EXIT_CONFIG)
    except (redis.RedisError, ShiwuError) as error:
        from shiwu.broker.redis_errors import explain  # noqa: PLC0415 --help needs none of its imports

        end(explain(error), EXIT_CONFIG)


def _options(
    *,
    file: Path,
    schedule: str,
    group: str,
    consumer: str | None,
    urls: bool,
    from_beginning: bool,
    timeout_s: float,
    lease_s: float,
    **given: Any,
) -> HooksOptions:
    from shiwu.client.arguments import read_text  # noqa: PLC0415 --help needs none of its imports
    from shiwu.hooks.endpoints import read_endpoints  # noqa: PLC0415 as above
    from shiwu.hooks.options import read_rules, read_schedule  # noqa: PLC0415 as above
    from shiwu.hooks.process import HooksOptions  # noqa: PLC0415 as above

    if lease_s <= timeout_s:
        raise ValueError(f"--lease: expected more seconds than --timeout ({timeout_s:g}), got {lease_s:g}")
    try:
        schedule_s = read_schedule(schedule)
    except ValueError as error:
        raise ValueError(f"--schedule: {error}") from None
    endpoints = read_endpoints(file)
    if urls and endpoints.for_urls is None:
        raise ValueError(f"--urls: expected a section `urls` in {file}, there is none")
    return HooksOptions(
        endpoints=endpoints,
        rules=read_rules(os.environ),
        schedule_s=schedule_s,
        group=read_text("--group", group, least=1),
        consumer=read_text("--consumer", consumer or socket.gethostname(), least=1),
        has_urls=urls,
        is_from_beginning=from_beginning,
        timeout_s=timeout_s,
        lease_s=lease_s,
        **given,
    )


def _run(options: HooksOptions, *, host: str, port: int | None) -> int:
    from shiwu.cli.metrics_server import serve  # noqa: PLC0415 --help needs none of its imports
    from shiwu.hooks.event_log import EventLog  # noqa: PLC0415 as above
    from shiwu.hooks.metrics import HooksMetrics  # noqa: PLC0415 as above
    from shiwu.hooks.process import HooksProcess, library_lines, stop_on_signals  # noqa: PLC0415 as above

    log, metrics = EventLog(), HooksMetrics()
    with ExitStack() as stack:
        stack.enter_context(library_lines(log))
        if port is not None:
            try:
                stack.enter_context(serve(metrics.registry, host=host, port=port))
            except OSError as error:
                end(f"--metrics-port: expected a free local address, got {host}:{port} ({error})", EXIT_CONFIG)
        process = HooksProcess(options, log=log, metrics=metrics)
        stop_on_signals(process)
        return 0 if process.run() else EXIT_INTERNAL


def _check(options: HooksOptions) -> int:
    from shiwu.hooks.check import run_checks  # noqa: PLC0415 --help needs none of its imports

    return run_checks(options)


if __name__ == "__main__":
    main()
