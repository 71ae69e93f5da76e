"""`shiwu sweep`: what workers do for all jobs, done where no worker runs."""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click
import redis
from pydantic_core import to_json

from shiwu.broker.redis_errors import explain, info_of
from shiwu.cli.base import Exit, end, main
from shiwu.cli.params import Seconds
from shiwu.client.client import Client
from shiwu.contract import printable

if TYPE_CHECKING:
    from shiwu.cli.sweep_metrics import SweepMetrics

COUNT_EVERY_S: Final = 5.0
"""How old the queues' numbers may be where they are exported."""


class Zone(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A time zone by its name."""

    name = "zone"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ZoneInfo:
        """The zone."""
        try:
            return ZoneInfo(str(value))
        except (ZoneInfoNotFoundError, ValueError, OSError):
            self.fail(f"expected a time zone as UTC or Asia/Shanghai, got {value!r:.80}", param, ctx)


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
    help="Seconds between two lines of numbers.",
)
@click.option("--once", is_flag=True, help="One round, one line, and exit.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics on this port.")
@click.option("--metrics-host", default="0.0.0.0", show_default=True, help="Address of that port.")  # noqa: S104 Prometheus scrapes it from outside
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
    help="Time zone of an `expires` that names none.",
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
    metrics_host: str,
    expect_workers: int,
    zone: ZoneInfo,
) -> None:
    """Requeue jobs of crashed workers, answer what ran out of time, and print the queues' numbers as JSON lines.

    Workers do all this themselves; run a sweep where they may be scaled to none. Several sweeps may run at the same
    time. A sweep goes on while Redis is away, and ends on SIGTERM or Ctrl-C with exit code 0.
    """
    with ExitStack() as stack:
        metrics = None
        if metrics_port is not None:
            metrics = _open_metrics(stack, host=metrics_host, port=metrics_port, expected_workers=expect_workers)
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
    """Sweeps, and tells the terminal and Prometheus what it saw."""

    def __init__(self, client: Client, *, metrics: SweepMetrics | None, print_every_s: float, zone: ZoneInfo) -> None:
        self._client = client
        self._zone = zone
        self._metrics = metrics
        self._print_every_s = print_every_s
        self._printed_s = self._counted_s = -math.inf
        self._is_redis_away = self._has_swept = False

    def try_sweep(self) -> None:
        """One round; says once, on stderr, that Redis does not answer.

        Raises:
            redis.RedisError: in the first round, when what Redis answers can never become another.
        """
        try:
            self.sweep()
            self._is_redis_away = False
        except redis.RedisError as error:
            if info_of(error).ends_start and not self._has_swept:
                raise
            if not self._is_redis_away:
                click.echo(f"shiwu: {printable(explain(error))}; trying again", err=True)
            self._is_redis_away = True
            if self._metrics is not None:
                self._metrics.redis_unreachable()

    def sweep(self, *, is_printed: bool = False) -> None:
        """One round.

        Raises:
            redis.RedisError: Redis does not answer, or refuses.
        """
        now_s = time.monotonic()
        swept = self._client.sweep(zone=self._zone)
        self._has_swept = True
        is_printed |= swept.did_something or self._is_redis_away or now_s - self._printed_s >= self._print_every_s
        is_exported = self._metrics is not None and now_s - self._counted_s >= COUNT_EVERY_S
        if is_printed or is_exported:
            state = self._client.queue_state()
            self._counted_s = now_s
            if self._metrics is not None:
                self._metrics.queues(state)
            if is_printed:
                self._printed_s = now_s
                click.echo(to_json({"swept": swept, "queues": state}))
        if self._metrics is not None:
            self._metrics.swept()


def _open_metrics(stack: ExitStack, *, host: str, port: int, expected_workers: int) -> SweepMetrics:
    try:
        from shiwu.cli.sweep_metrics import SweepMetrics, serve  # noqa: PLC0415 prometheus-client is an extra
    except ModuleNotFoundError as error:
        end(
            f"--metrics-port needs prometheus-client ({error}); run pip install '.[metrics]' in a clone of shiwu",
            Exit.USAGE,
        )
    metrics = SweepMetrics(expected_workers=expected_workers)
    try:
        stack.enter_context(serve(metrics, host=host, port=port))
    except OSError as error:
        end(f"--metrics-port: expected an address that can be used, got {host}:{port} ({error})", Exit.USAGE)
    return metrics
