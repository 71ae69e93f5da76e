"""`shiwu sweep`: what workers do for all jobs, done where no worker runs."""

from __future__ import annotations

import signal
import threading
import time

import click
import redis
from pydantic_core import to_json

from shiwu.cli.base import main
from shiwu.client import Client


@main.command()
@click.option("--every", "every_s", default=1.0, show_default=True, help="Seconds between two rounds.")
@click.option("--tell-every", "tell_s", default=10.0, show_default=True, help="Seconds between two lines of numbers.")
@click.option("--once", is_flag=True, help="One round, one line, and out.")
@click.pass_obj
def sweep(client: Client, /, *, every_s: float, tell_s: float, once: bool) -> None:
    """Bring back jobs of dead workers, answer what ran out of time, and print the queues' numbers as JSON lines.

    Workers do all this themselves; run a sweep where they may be scaled to none. Many at once do no harm. It goes on
    while Redis is away, and ends on SIGTERM or Ctrl-C with exit code 0.
    """
    stop = threading.Event()
    if not once:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    told_s = -tell_s
    away = False
    while not stop.is_set():
        try:
            swept = client.sweep()
            if swept.did_something or away or time.monotonic() - told_s >= tell_s or once:
                told_s, away = time.monotonic(), False
                click.echo(to_json({"swept": swept, "queues": client.queue_state()}))
        except redis.RedisError as error:
            if once:
                raise
            if not away:
                click.echo(f"shiwu: redis: {error}; trying again", err=True)
            away = True
        if once:
            return
        stop.wait(every_s)
