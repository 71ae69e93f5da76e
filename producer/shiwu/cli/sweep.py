"""The command `shiwu sweep`: maintenance of the queue where no worker may be running."""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click
import redis
from pydantic_core import to_json

from shiwu.broker.redis_errors import explain, info_of
from shiwu.cli.base import Exit, end, main
from shiwu.cli.http_server import serve_app
from shiwu.cli.load_page import LoadPage
from shiwu.cli.params import Seconds
from shiwu.client.client import Client
from shiwu.contract import printable

if TYPE_CHECKING:
    from shiwu.cli.sweep_metrics import SweepMetrics

COUNT_EVERY_S: Final = 5.0
"""Seconds between two counts of the queues for Prometheus."""
LOAD_EVERY_S: Final = 2.0
"""Seconds between two counts of the queues for an autoscaler."""


class Zone(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A time zone by its name."""

    name = "zone"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> ZoneInfo:
        """The zone."""
        try:
            return ZoneInfo(str(value))
        except (ZoneInfoNotFoundError, ValueError, OSError):
            self.fail(f"expected a time zone such as UTC or Asia/Shanghai, got {value!r:.80}", param, ctx)


@main.command()
@click.option(
    "--every", "every_s", type=Seconds(least_s=0.1), default=1.0, show_default=True, help="Seconds between two rounds."
)
@click.option(
    "--tell-every",
    "tell_s",
    type=Seconds(),
    default=10.0,
    show_default=True,
    help="Seconds between two printed lines.",
)
@click.option("--once", is_flag=True, help="Do one round, print one line, and exit.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics on this port.")
@click.option(
    "--http-port",
    type=click.IntRange(1, 65535),
    help="Serve /load as JSON on this port, for an autoscaler, and /metrics where prometheus-client is installed.",
)
@click.option("--metrics-host", default="0.0.0.0", show_default=True, help="Address of these ports.")  # noqa: S104 Prometheus and KEDA ask it from outside
@click.option(
    "--expect-workers",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Workers that should run at all times, for the alert ShiwuNoWorkers.",
)
@click.option(
    "--timezone",
    "zone",
    type=Zone(),
    default="UTC",
    show_default=True,
    envvar="SHIWU_TIMEZONE",
    show_envvar=True,
    help="Time zone of an `expires` without one.",
)
@click.pass_obj
def sweep(
    client: Client,
    /,
    *,
    every_s: float,
    tell_s: float,
    once: bool,
    metrics_port: int | None,
    http_port: int | None,
    metrics_host: str,
    expect_workers: int,
    zone: ZoneInfo,
) -> None:
    """Requeue jobs of crashed workers, answer jobs out of time, and print queue sizes as JSON lines.

    Workers do all this themselves; run a sweep where they may be scaled to zero. Several sweeps may run at the same
    time. A sweep goes on while Redis is unavailable, and ends on SIGTERM or Ctrl-C with exit code 0.
    """
    with ExitStack() as stack:
        metrics = None
        if metrics_port is not None:
            metrics = _open_metrics(stack, host=metrics_host, port=metrics_port, expected_workers=expect_workers)
        if http_port is not None:
            metrics = metrics or _metrics_if_installed(expected_workers=expect_workers)
            _serve_load(stack, client, host=metrics_host, port=http_port, metrics=metrics)
        sweeper = _Sweeper(client, metrics=metrics, print_every_s=tell_s, zone=zone)
        if once:
            sweeper.sweep(is_printed=True)
            return
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        while not stop.is_set():
            sweeper.try_sweep()
            stop.wait(every_s)


class _Sweeper:
    """Runs sweeps, and reports to the terminal and to Prometheus."""

    def __init__(self, client: Client, *, metrics: SweepMetrics | None, print_every_s: float, zone: ZoneInfo) -> None:
        self._client = client
        self._zone = zone
        self._metrics = metrics
        self._print_every_s = print_every_s
        self._printed_s = self._counted_s = -math.inf
        self._is_redis_unavailable = self._has_swept = False

    def try_sweep(self) -> None:
        """Do one round; report once on standard error that Redis is unavailable.

        Raises:
            redis.RedisError: the first round failed with an error that time cannot cure.
        """
        try:
            self.sweep()
            self._is_redis_unavailable = False
        except redis.RedisError as error:
            if info_of(error).ends_start and not self._has_swept:
                raise
            if not self._is_redis_unavailable:
                click.echo(f"shiwu: {printable(explain(error))}; trying again", err=True)
            self._is_redis_unavailable = True
            if self._metrics is not None:
                self._metrics.redis_unreachable()

    def sweep(self, *, is_printed: bool = False) -> None:
        """Do one round; print and export the queue sizes if that is due.

        Raises:
            redis.RedisError: Redis is unavailable, or refuses a command.
        """
        now_s = time.monotonic()
        report = self._client.sweep(zone=self._zone)
        self._has_swept = True
        is_printed |= (
            report.did_something or self._is_redis_unavailable or now_s - self._printed_s >= self._print_every_s
        )
        is_exported = self._metrics is not None and now_s - self._counted_s >= COUNT_EVERY_S
        if is_printed or is_exported:
            state = self._client.queue_state()
            self._counted_s = now_s
            if self._metrics is not None:
                self._metrics.queues(state)
            if is_printed:
                self._printed_s = now_s
                click.echo(to_json({"swept": report, "queues": state}))
        if self._metrics is not None:
            self._metrics.swept()


def _serve_load(stack: ExitStack, client: Client, *, host: str, port: int, metrics: SweepMetrics | None) -> None:
    app = None
    if metrics is not None:
        from prometheus_client import make_wsgi_app  # noqa: PLC0415 prometheus-client is an extra

        app = make_wsgi_app(metrics.registry)
    page = LoadPage(metrics=app)
    try:
        stack.enter_context(serve_app(page, host=host, port=port))
    except OSError as error:
        end(f"--http-port: expected an address that is free and local, got {host}:{port} ({error})", Exit.USAGE)
    stop = threading.Event()
    # On a thread of its own, because a sweep takes long while a shard hangs.
    threading.Thread(target=_count_load, args=(client, page, stop), name="load", daemon=True).start()
    stack.callback(stop.set)


def _count_load(client: Client, page: LoadPage, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(redis.RedisError):  # the sweep reports it
            page.update(client.shard_states())
        stop.wait(LOAD_EVERY_S)


def _metrics_if_installed(*, expected_workers: int) -> SweepMetrics | None:
    try:
        from shiwu.cli.sweep_metrics import SweepMetrics  # noqa: PLC0415 prometheus-client is an extra
    except ModuleNotFoundError:
        return None
    return SweepMetrics(expected_workers=expected_workers)


def _open_metrics(stack: ExitStack, *, host: str, port: int, expected_workers: int) -> SweepMetrics:
    try:
        from shiwu.cli.metrics_server import serve  # noqa: PLC0415 prometheus-client is an extra
        from shiwu.cli.sweep_metrics import SweepMetrics  # noqa: PLC0415 as above
    except ModuleNotFoundError as error:
        end(
            f"--metrics-port needs prometheus-client ({error}); run pip install '.[metrics]' in a clone of shiwu",
            Exit.USAGE,
        )
    metrics = SweepMetrics(expected_workers=expected_workers)
    try:
        stack.enter_context(serve(metrics.registry, host=host, port=port))
    except OSError as error:
        end(f"--metrics-port: expected an address that is free and local, got {host}:{port} ({error})", Exit.USAGE)
    return metrics
