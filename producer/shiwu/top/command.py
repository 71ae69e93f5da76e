"""The command `shiwu top`. Imports nothing that takes time before the command runs."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import click
import redis

from shiwu.cli.base import Exit
from shiwu.cli.params import Seconds
from shiwu.client.client import Client

if TYPE_CHECKING:
    from shiwu.top.shards import Reader

TIMEOUT_S: Final = 2.0
"""How long one command of Redis may take before the view says that Redis is away."""
MIN_INTERVAL_S: Final = 2.0
"""With it a view sends less than five commands a second."""


@click.command()
@click.option("--once", "is_once", is_flag=True, help="Print one look as tables, and exit.")
@click.option(
    "--json", "is_json", is_flag=True, help="Print each look as a line of JSON until Ctrl-C; with --once one."
)
@click.option("--read-only", "is_read_only", is_flag=True, help="Offer no requeue.")
@click.option("--serve", "port", type=click.IntRange(1, 65535), help="Serve a page that only shows, on this port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of that port.")
@click.option(
    "--every",
    "every_s",
    type=Seconds(least_s=MIN_INTERVAL_S),
    default=MIN_INTERVAL_S,
    show_default=True,
    help="Seconds between two looks.",
)
@click.pass_obj
def top(
    client: Client,
    /,
    *,
    is_once: bool,
    is_json: bool,
    is_read_only: bool,
    port: int | None,
    host: str,
    every_s: float,
) -> None:
    """Watch lanes, stages, workers and failures live.

    Keys: 1 to 6 show one part alone, Enter lists the dead letters of a code, r requeues them after a question, /
    filters, q quits. Needs a Redis user that may read lanes, answers and workers, as shiwu-admin.
    """
    if port is not None and (is_once or is_json):
        raise click.UsageError("expected --serve, or --once and --json")
    from shiwu.broker.sharding import PoolOptions, open_shards  # noqa: PLC0415 the command imports light
    from shiwu.client.calls import ClientOptions  # noqa: PLC0415 the command imports light
    from shiwu.top.reader import LookReader  # noqa: PLC0415 the command imports light
    from shiwu.top.shards import ShardsReader  # noqa: PLC0415 the command imports light

    url = click.get_current_context().find_root().params["redis_url"]
    options = ClientOptions.read(url, max_waiting=1, timeout_s=TIMEOUT_S, max_connections=2)
    limits = PoolOptions(timeout_s=TIMEOUT_S, max_connections=options.max_connections, client_name="shiwu-top")
    clients = open_shards(options.redis_url, limits)
    with ExitStack() as stack:
        for connection in clients:
            stack.enter_context(connection)
        reader: Reader = LookReader(clients[0])
        if options.shards > 1:
            _check_count(clients[0], shards=options.shards)
            reader = stack.enter_context(ShardsReader(clients))
        if port is not None:
            _serve(reader, where=_where(options.redis_url), host=host, port=port, every_s=every_s)
        elif is_json:
            _print_json(reader, is_once=is_once, every_s=every_s)
        elif is_once:
            from shiwu.top.once import print_look  # noqa: PLC0415 the command imports light

            print_look(reader.read())
        else:
            _show(client, reader, where=_where(options.redis_url), is_read_only=is_read_only, every_s=every_s)


def _check_count(first: redis.Redis, *, shards: int) -> None:
    """Compare the number of shards, unless the first of them is unavailable, which the view tells.

    Raises:
        redis.RedisError: the cluster has another number.
    """
    from shiwu.broker.redis_errors import info_of  # noqa: PLC0415 the command imports light
    from shiwu.broker.sharding import keep_shard_count  # noqa: PLC0415 the command imports light

    try:
        keep_shard_count(first, shards=shards)
    except redis.RedisError as error:
        if not info_of(error).is_temporary:
            raise


def _print_json(reader: Reader, *, is_once: bool, every_s: float) -> None:
    import msgspec  # noqa: PLC0415 the command imports light

    from shiwu.cli.terminal import echo_json  # noqa: PLC0415 the command imports light

    if is_once:
        echo_json(msgspec.json.encode(reader.read()))
        return
    pause = threading.Event()
    try:
        while True:
            echo_json(msgspec.json.encode(reader.look()))
            pause.wait(every_s)
    except KeyboardInterrupt:
        sys.exit(int(Exit.OK))


def _serve(reader: Reader, *, where: str, host: str, port: int, every_s: float) -> None:
    from shiwu.cli.http_server import serve_app  # noqa: PLC0415 the command imports light
    from shiwu.top.page import TopPage  # noqa: PLC0415 the command imports light

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    page = TopPage(reader, where=where, host=host, every_s=every_s)
    try:
        with serve_app(page, host=host, port=port):
            click.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}/", err=True)
            stop.wait()
    except OSError as error:
        raise click.UsageError(
            f"--serve: expected an address that is free and local, got {host}:{port} ({error})"
        ) from None


def _show(client: Client, reader: Reader, *, where: str, is_read_only: bool, every_s: float) -> None:
    if find_spec("textual") is None:
        text = "top needs textual: run `pip install '.[top]'` in a clone of shiwu, or use --once or --json"
        raise click.UsageError(text)
    if not sys.stdout.isatty():
        raise click.UsageError("expected a terminal; use --once or --json in a pipe or a file")
    from shiwu.top.app import TopApp  # noqa: PLC0415 Textual is an extra

    requeue = None if is_read_only else client.requeue
    TopApp(reader, requeue, where=where, every_s=every_s).run()


def _where(url: str) -> str:
    """Host and database, without the login."""
    from shiwu.broker.redis_url import read_redis_url  # noqa: PLC0415 the command imports light

    address = read_redis_url(url, may_be_cluster=True)
    hosts = ",".join(f"{host}:{port}" for host, port in address.hosts) or address.socket_path
    return f"{hosts}/{address.primary or (f'{address.shards} shards' if address.shards else address.database)}"
