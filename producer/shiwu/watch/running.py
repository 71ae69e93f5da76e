"""Runs a watcher: opens its parts from the options of the command, and ends them."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import click
import redis

from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.cli.base import Exit, end
from shiwu.cli.terminal import echo_json
from shiwu.cli.yaml_files import FileError, read_text
from shiwu.client.calls import ClientOptions
from shiwu.client.client import Client
from shiwu.contract import printable, without_logins
from shiwu.watch.intake import Intake
from shiwu.watch.reports import ConsoleReports
from shiwu.watch.rules import Rules, RulesError, read_rules
from shiwu.watch.sources.base import SourceUnavailable, SourceWrong
from shiwu.watch.sources.opening import default_watcher, open_source
from shiwu.watch.unread import read_unread
from shiwu.watch.watcher import Watcher

if TYPE_CHECKING:
    from shiwu.watch.metrics import WatchMetrics

MAX_TOKEN_FILE_BYTES: Final = 64 * 1024
MIN_TOKEN_CHARS: Final = 16
HTTP_PORT: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """The options of the command."""

    client: Client
    redis_url: str | None
    source: str
    rules_file: Path | None
    watcher: str | None
    is_once: bool
    portion: int
    max_waiting: int | None
    replicas: int
    token_file: Path | None
    is_token_required: bool
    metrics_port: int | None
    metrics_host: str

    @property
    def is_http(self) -> bool:
        """Whether events come over HTTP."""
        return self.source.lower().startswith("http://")


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    path: str


def run_watcher(options: WatchOptions) -> None:
    """Watch until SIGTERM, Ctrl-C, or with `--once` until the source is empty."""
    with _errors(), ExitStack() as stack:
        rules = _rules(options)
        stop = stack.enter_context(_stopped_by_signals())
        keeper, *_ = stack.enter_context(_shards(options))
        keeper.ping()
        reports = ConsoleReports(_open_metrics(stack, options))
        if options.is_http:
            _receive(options, rules=rules, keeper=keeper, reports=reports, stack=stack, stop=stop)
            return
        source = open_source(options.source, watcher=options.watcher or default_watcher(), stop=stop)
        stack.callback(source.close)
        found = source.check()
        if not options.is_once:
            reports.started(f"{source.name}: {found}", rules)
        intake = _intake(options, keeper, rules, source=source.name)
        Watcher(source, intake, reports, portion=options.portion, stop=stop).run(is_once=options.is_once)


def check_all(options: WatchOptions) -> None:
    """Try everything that a watcher needs, and print one line for each."""
    with _errors(), ExitStack() as stack:
        rules = _rules(options)
        click.echo(f"rules: {len(rules.all)} in {options.rules_file}")
        shards = stack.enter_context(_shards(options))
        for shard in shards:
            shard.ping()
        click.echo("redis: answers" if len(shards) == 1 else f"redis: all {len(shards)} shards answer")
        if options.is_http:
            address, tokens = _http_options(options)
            stack.enter_context(_listener(address))
            click.echo(f"source: {address.host}:{address.port} is free; {len(tokens)} tokens")
            return
        source = open_source(options.source, watcher=options.watcher or default_watcher(), stop=threading.Event())
        stack.callback(source.close)
        click.echo(f"source: {printable(source.name)}: {source.check()}")


def print_unread(options: WatchOptions) -> None:
    """Print what could not be read, newest first."""
    with _shards(options) as shards:
        for line in read_unread(shards[0]):
            echo_json(line)


def _intake(options: WatchOptions, keeper: redis.Redis, rules: Rules, *, source: str) -> Intake:
    return Intake(
        options.client, keeper, rules, source=source, max_waiting=options.max_waiting, replicas=options.replicas
    )


def _rules(options: WatchOptions) -> Rules:
    if not options.source:
        end("expected a SOURCE such as redis://host/0?key=bucketevents; see shiwu watch --help", Exit.USAGE)
    if options.rules_file is None:
        end("expected --rules FILE; docs/events.md shows one", Exit.USAGE)
    return read_rules(options.rules_file)


@contextmanager
def _errors() -> Iterator[None]:
    """End with one line and an exit code where a file or the source is wrong."""
    try:
        yield
    except (RulesError, FileError) as error:
        end(str(error), Exit.CONFIG)
    except SourceWrong as error:
        end(without_logins(str(error)), Exit.CONFIG)
    except SourceUnavailable as error:
        end(without_logins(str(error)), Exit.QUEUE)
    except ModuleNotFoundError as error:
        end(f"watch needs {error.name}: run `pip install '.[watch]'` in a clone of shiwu", Exit.USAGE)


@contextmanager
def _shards(options: WatchOptions) -> Iterator[Sequence[redis.Redis]]:
    """Clients of shiwu's own Redis, one for each shard. The first keeps what could not be read."""
    asked = ClientOptions.read(options.redis_url, max_waiting=1, timeout_s=5.0, max_connections=4)
    limits = PoolOptions(
        timeout_s=asked.timeout_s, retries=3, max_connections=asked.max_connections, client_name="shiwu-watch"
    )
    clients = open_shards(asked.redis_url, limits)
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _open_metrics(stack: ExitStack, options: WatchOptions) -> WatchMetrics | None:
    if options.metrics_port is None:
        return None
    from shiwu.cli.metrics_server import serve  # noqa: PLC0415 prometheus-client is an extra
    from shiwu.watch.metrics import WatchMetrics  # noqa: PLC0415 the same

    metrics = WatchMetrics()
    where = f"{options.metrics_host}:{options.metrics_port}"
    try:
        stack.enter_context(serve(metrics.registry, host=options.metrics_host, port=options.metrics_port))
    except OSError as error:
        end(f"--metrics-port: expected an address that is free and local, got {where} ({error})", Exit.USAGE)
    return metrics


# ------------------------------------------------------------------------------------ http://
def _receive(
    options: WatchOptions,
    *,
    rules: Rules,
    keeper: redis.Redis,
    reports: ConsoleReports,
    stack: ExitStack,
    stop: threading.Event,
) -> None:
    from shiwu.watch.receiver import Receiver, serve_events  # noqa: PLC0415 starlette and uvicorn are an extra

    if options.is_once:
        end("--once: expected a source that can be emptied, and http:// cannot", Exit.USAGE)
    address, tokens = _http_options(options)
    listener = stack.enter_context(_listener(address))
    intake = _intake(options, keeper, rules, source=options.source)
    receiver = Receiver(intake, reports, path=address.path, tokens=tokens, stop=stop)
    reports.source()
    reports.started(options.source, rules)
    serve_events(receiver, listener, stop)
    if receiver.output_error is not None:
        raise receiver.output_error


def _http_options(options: WatchOptions) -> tuple[_Address, list[bytes]]:
    expected = "expected http://ADDRESS:PORT/PATH without user name and query"
    try:
        parts = urlsplit(options.source)
        port = parts.port
    except ValueError:
        end(expected, Exit.USAGE)
    if not parts.hostname or parts.username or parts.query or parts.fragment:
        end(expected, Exit.USAGE)
    address = _Address(parts.hostname, HTTP_PORT if port is None else port, parts.path or "/")
    return address, _tokens(options, address.host)


def _tokens(options: WatchOptions, host: str) -> list[bytes]:
    from shiwu.watch.receiver import is_loopback  # noqa: PLC0415 starlette and uvicorn are an extra

    if options.token_file is None:
        if options.is_token_required and not is_loopback(host):
            end(
                f"expected --token-file FILE for an address that other machines reach ({host}), or --no-token",
                Exit.USAGE,
            )
        return []
    text = read_text(options.token_file, max_bytes=MAX_TOKEN_FILE_BYTES)
    tokens = {number: line.strip().encode() for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    expected = f"expected tokens of at least {MIN_TOKEN_CHARS} characters, one a line"
    if not tokens:
        raise FileError(f"{options.token_file}: {expected}, got none")
    for number, token in tokens.items():
        if len(token) < MIN_TOKEN_CHARS:
            raise FileError(f"{options.token_file}, line {number}: {expected}, got {len(token)} characters")
    return list(tokens.values())


@contextmanager
def _listener(address: _Address) -> Iterator[socket.socket]:
    from shiwu.watch.receiver import listen  # noqa: PLC0415 starlette and uvicorn are an extra

    try:
        opened = listen(address.host, address.port)
    except OSError as error:
        end(f"expected an address that is free and local, got {address.host}:{address.port} ({error})", Exit.USAGE)
    with opened:
        yield opened
