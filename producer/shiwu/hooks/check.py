"""`shiwu-hooks --check` tries Redis and connects to every endpoint; `shiwu hooks test` sends one delivery."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from urllib.parse import urlsplit

import click
import redis

from shiwu.broker.redis_errors import explain
from shiwu.broker.sharding import PoolOptions, keep_shard_count, open_shards
from shiwu.contract import printable, source_of
from shiwu.hooks.endpoints import Endpoint
from shiwu.hooks.process import REDIS_TIMEOUT_S, HooksOptions, queue_options
from shiwu.hooks.router import envelope
from shiwu.hooks.sender import Sender
from shiwu.hooks.shards import AllDeliveries, open_queues
from shiwu.network.address_guard import AddressGuard, AddressRefused, UnknownHost
from shiwu.network.address_rules import AddressRules

FAILED = 64


def run_checks(options: HooksOptions) -> int:
    """Print a line for each check; return the exit code, 0 where all passed."""
    results = [_check_redis(options), *(_check_endpoint(each, options) for each in options.endpoints.named)]
    if options.endpoints.for_urls is not None:
        results.append(_line("urls", None, "on" if options.has_urls else "off: SHIWU_HOOKS_URLS is not set"))
    return 0 if all(results) else FAILED


def _line(name: str, error: str | None, note: str = "") -> bool:
    text = f"{name}: {'ok' if error is None else 'FAILED'} {printable(error or note)}".rstrip()
    click.echo(text)
    return error is None


def _check_redis(options: HooksOptions) -> bool:
    with ExitStack() as stack:
        clients = open_shards(options.redis_url, PoolOptions(timeout_s=REDIS_TIMEOUT_S))
        for client in clients:
            stack.callback(client.close)
        try:
            if len(clients) > 1:
                keep_shard_count(clients[0], shards=len(clients))
            dead = AllDeliveries(open_queues(clients, queue_options(options))).dead_count()
        except redis.RedisError as error:
            return _line("redis", explain(error))
        where = f" in {len(clients)} shards" if len(clients) > 1 else ""
        return _line("redis", None, f"{dead} dead deliveries{where}")


def _check_endpoint(endpoint: Endpoint, options: HooksOptions) -> bool:
    """Connect as a delivery would, without a request."""
    error = _connection_error(endpoint, options.rules, timeout_s=options.timeout_s)
    return _line(f"endpoint {endpoint.key}", error, source_of(endpoint.url))


def _connection_error(endpoint: Endpoint, rules: AddressRules, *, timeout_s: float) -> str | None:
    """Why no connection to the endpoint is possible or allowed."""
    parts = urlsplit(endpoint.url)
    port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    guard = AddressGuard(rules)
    deadline_s = time.monotonic() + timeout_s
    try:
        if rules.proxy_url is not None:
            guard.check_name(parts.hostname or "", port)
        else:
            guard.connect(parts.hostname or "", port, timeout_s=timeout_s, deadline_s=deadline_s).close()
    except (AddressRefused, UnknownHost, OSError) as error:
        return f"{source_of(endpoint.url)}: {error}"
    return None


def send_test(endpoint: Endpoint, rules: AddressRules, *, timeout_s: float) -> tuple[bool, str]:
    """Send a delivery of type `test`; return whether it was accepted, and a line that says what came of it."""
    sender = Sender(rules, timeout_s=timeout_s, threads=1, user_agent=f"shiwu-hooks/{version('shiwu')}")
    body = envelope("test", at=datetime.now(UTC), data=b"{}")
    delivery_id = f"test-{secrets.token_hex(8)}.0"
    began_s = time.monotonic()
    outcome = sender.send(endpoint, delivery_id=delivery_id, url=endpoint.url, body=body)
    ms = (time.monotonic() - began_s) * 1000
    status = "" if outcome.status is None else f", HTTP {outcome.status}"
    text = f"{outcome.reason}{status}, {ms:.0f} ms, webhook id {delivery_id}"
    if outcome.status is None and (error := _connection_error(endpoint, rules, timeout_s=timeout_s)):
        text = f"{text} ({error})"
    return outcome.is_delivered, text
