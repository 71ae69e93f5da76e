"""The command group `shiwu hooks`. Imports nothing that takes time before a command runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from pydantic_core import to_json

from shiwu.cli.base import Exit, end, redis_url_of
from shiwu.cli.terminal import Row, echo_data, echo_json, moment_text, print_rows

if TYPE_CHECKING:
    from shiwu.hooks.delivery_queue import DeadDelivery, EndpointHealth
    from shiwu.hooks.shards import AllDeliveries

REDIS_TIMEOUT_S: Final = 5.0
TEST_TIMEOUT_S: Final = 15.0
file_option = click.option(
    "--endpoints",
    "file",
    envvar="SHIWU_HOOKS_FILE",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="YAML file of the endpoints.",
)


@click.group()
def hooks() -> None:
    """Webhooks: their endpoints, and deliveries that were given up.

    \b
    shiwu hooks status
    shiwu hooks list --endpoint orders
    shiwu hooks retry --endpoint orders
    shiwu hooks test orders --endpoints endpoints.yaml

    The command shiwu-hooks makes the deliveries; see docs/webhooks.md.
    """


@hooks.command(name="list")
@click.option("--endpoint", help="Only those of this endpoint.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_command(ctx: click.Context, /, *, endpoint: str | None, limit: int, as_json: bool) -> None:
    """Show deliveries that were given up, newest first."""
    with _queue(ctx) as queue:
        found = list(queue.dead(endpoint=endpoint, limit=limit))
    if as_json:
        for letter in found:
            echo_json(to_json(_shown(letter)))
        return
    rows = [
        Row((each["webhook_id"], each["endpoint"], each["ended"], each["reason"], str(each["tries"])), red=3)
        for each in map(_shown, found)
    ]
    print_rows(("webhook id", "endpoint", "ended", "reason", "tries"), rows, text_columns=(0, 1), optional=(4, 2))


def _shown(letter: DeadDelivery) -> dict[str, Any]:
    delivery = letter.delivery
    return {
        "webhook_id": delivery.id,
        "endpoint": delivery.endpoint,
        "ended": moment_text(letter.died_ms),
        "created": moment_text(delivery.created_ms),
        "reason": letter.reason,
        "tries": delivery.failed,
        "answers": delivery.payload.count,
    }


@hooks.command()
@click.argument("webhook_ids", nargs=-1, metavar="WEBHOOK_ID…")
@click.option("--endpoint", help="All of this endpoint.")
@click.option("--all", "is_all", is_flag=True, help="All of all endpoints.")
@click.pass_context
def retry(ctx: click.Context, /, *, webhook_ids: tuple[str, ...], endpoint: str | None, is_all: bool) -> None:
    """Make deliveries that were given up due again, with the same ids; print the ids.

    Their endpoints are enabled and count as healthy; with --endpoint also one without such deliveries.
    """
    if bool(webhook_ids) + (endpoint is not None) + is_all != 1:
        raise click.UsageError("expected webhook ids, --endpoint, or --all")
    wanted = set(webhook_ids)
    with _queue(ctx) as queue:
        chosen = [
            (letter.delivery.endpoint, letter.delivery.id)
            for letter in queue.dead(endpoint=endpoint)
            if not wanted or letter.delivery.id in wanted
        ]
        queue.revive(chosen, endpoints=[endpoint] if endpoint else [])
    for _, webhook_id in chosen:
        echo_data(webhook_id)
    if missing := wanted - {webhook_id for _, webhook_id in chosen}:
        end(f"{len(missing)} of {len(wanted)} ids are no dead deliveries, first {min(missing)}", Exit.NOT_TAGGED)


@hooks.command()
@file_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def status(ctx: click.Context, /, *, file: Path | None, as_json: bool) -> None:
    """Show what waits for each endpoint, and how the endpoint does.

    With the file also endpoints for which nothing waits and that never failed.
    """
    with _queue(ctx) as queue:
        health = queue.health()
        names = sorted({*queue.endpoints_with_deliveries(), *health, *_names_in(file)})
        pending = queue.pending(names)
        dead = queue.dead_count()
        now_ms = queue.now_ms()
    shown = [_endpoint_status(name, pending[name], health.get(name), now_ms=now_ms) for name in names]
    if as_json:
        echo_json(to_json({"endpoints": shown, "dead": dead}))
        return
    rows = [
        Row(
            (each["endpoint"], each["state"], str(each["pending"]), str(each["failures"]), each["last_failure"] or ""),
            red=None if each["state"] == "ok" else 1,
        )
        for each in shown
    ]
    headings = ("endpoint", "state", "pending", "failures", "last failure")
    print_rows(headings, rows, text_columns=(0,), optional=(4, 3))
    click.echo(f"dead deliveries: {dead}")


def _endpoint_status(name: str, pending: int, health: EndpointHealth | None, *, now_ms: float) -> dict[str, Any]:
    from shiwu.hooks.delivery_queue import ALONE_AFTER  # noqa: PLC0415 this module imports light

    state, failures, last = "ok", 0, None
    if health is not None:
        failures = health.failures
        last = f"{health.reason} {moment_text(health.last_failure_ms)}" if health.last_failure_ms else None
        if health.disabled_ms:
            state = "disabled"
        elif failures >= ALONE_AFTER:
            state = "failing"
        elif health.not_before_ms > now_ms:
            state = "paused"
    return {"endpoint": name, "state": state, "pending": pending, "failures": failures, "last_failure": last}


def _names_in(file: Path | None) -> list[str]:
    if file is None:
        return []
    from shiwu.hooks.endpoints import EndpointsError, read_endpoints  # noqa: PLC0415 this module imports light

    try:
        return [endpoint.key for endpoint in read_endpoints(file).named]
    except EndpointsError as error:
        end(str(error), Exit.CONFIG)


@hooks.command()
@click.argument("name")
@file_option
def test(*, name: str, file: Path | None) -> None:
    """Send a delivery of type `test` to an endpoint, and print what came of it. Needs no Redis.

    The same signature, address rules and time-out as for answers. Exit code 1 where it was not accepted.
    """
    from shiwu.hooks.check import send_test  # noqa: PLC0415 this module imports light
    from shiwu.hooks.endpoints import EndpointsError, read_endpoints  # noqa: PLC0415 as above
    from shiwu.hooks.options import OptionsError, read_rules  # noqa: PLC0415 as above

    if file is None:
        raise click.UsageError("expected --endpoints FILE or SHIWU_HOOKS_FILE")
    try:
        endpoint = read_endpoints(file).find(name)
        rules = read_rules(os.environ)
    except (EndpointsError, OptionsError) as error:
        end(str(error), Exit.CONFIG)
    if endpoint is None:
        end(f"expected the name of an endpoint in {file}, got {name}", Exit.USAGE)
    is_delivered, text = send_test(endpoint, rules, timeout_s=TEST_TIMEOUT_S)
    if not is_delivered:
        end(text, Exit.NOT_TAGGED)
    click.echo(text)


@contextmanager
def _queue(ctx: click.Context) -> Iterator[AllDeliveries]:
    from shiwu.broker.sharding import PoolOptions, open_shards  # noqa: PLC0415 this module imports light
    from shiwu.hooks.delivery_queue import QueueOptions  # noqa: PLC0415 as above
    from shiwu.hooks.shards import AllDeliveries, open_queues  # noqa: PLC0415 as above

    url = redis_url_of(ctx)
    with ExitStack() as stack:
        clients = open_shards(url, PoolOptions(timeout_s=REDIS_TIMEOUT_S, retries=3))
        for client in clients:
            stack.callback(client.close)
        yield AllDeliveries(open_queues(clients, QueueOptions()))
