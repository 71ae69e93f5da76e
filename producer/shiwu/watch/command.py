"""The command `shiwu watch`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click

from shiwu.client.client import Client

MAX_PORTION: Final = 10_000
MAX_REPLICAS: Final = 10
NAME: Final = re.compile(r"[\w.-]{1,100}")


@click.command()
@click.argument("source", envvar="SHIWU_WATCH_SOURCE", required=False)
@click.option(
    "--rules",
    type=click.Path(path_type=Path),
    envvar="SHIWU_WATCH_RULES",
    show_envvar=True,
    help="File of rules, YAML.",
)
@click.option("--name", help="Name of this watcher, kept over restarts. Default: the name of the machine.")
@click.option("--once", "is_once", is_flag=True, help="End when the source is empty.")
@click.option("--check", "is_check", is_flag=True, help="Try the rules, the source and Redis, take nothing, and exit.")
@click.option(
    "--unread", "is_unread", is_flag=True, help="Print messages that could not be read as JSON lines, newest first."
)
@click.option(
    "--portion",
    default=200,
    show_default=True,
    type=click.IntRange(1, MAX_PORTION),
    help="Messages that are taken together.",
)
@click.option("--max-waiting", type=click.IntRange(min=1), help="Messages that a lane may hold. Default: 100000.")
@click.option(
    "--replicas",
    default=0,
    show_default=True,
    type=click.IntRange(0, MAX_REPLICAS),
    help="Replicas of shiwu's Redis that must confirm what an event became before the event is removed.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    envvar="SHIWU_WATCH_TOKEN_FILE",
    show_envvar=True,
    help="For http://: file with the bearer tokens that let requests in, one a line.",
)
@click.option(
    "--no-token",
    "has_no_token",
    is_flag=True,
    help="For http://: let every request in, as behind a proxy that checks them.",
)
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics on this port.")
@click.option("--metrics-host", default="0.0.0.0", show_default=True, help="Address of that port.")  # noqa: S104 Prometheus scrapes it from outside
@click.pass_context
def watch(
    ctx: click.Context,
    /,
    *,
    source: str | None,
    rules: Path | None,
    name: str | None,
    is_once: bool,
    is_check: bool,
    is_unread: bool,
    portion: int,
    max_waiting: int | None,
    replicas: int,
    token_file: Path | None,
    has_no_token: bool,
    metrics_port: int | None,
    metrics_host: str,
) -> None:
    """Enqueue the images that are stored in buckets, as their events come.

    \b
    SOURCE is where the events are:
    redis://host/0?key=bucketevents   MinIO's Redis target, format access or namespace
    sqs://QUEUE                       a queue of SQS, by its name or URL
    http://0.0.0.0:8080/events        a port for CloudEvents, MinIO's webhook and EventBridge

    An event is enqueued at least once, always with the same job id, and so answered once. It goes to the lane and the
    labels of the first rule that matches its bucket and key. A watcher waits while a lane is full, goes on while Redis
    or the source is unavailable, and ends on SIGTERM or Ctrl-C with exit code 0. See docs/events.md.
    """
    try:
        from shiwu.watch.running import WatchOptions, check_all, print_unread, run_watcher  # noqa: PLC0415 not for --help
    except ModuleNotFoundError as error:
        raise click.UsageError(f"watch needs {error.name}: run `pip install '.[watch]'` in a clone of shiwu") from None
    if name is not None and not NAME.fullmatch(name):
        raise click.UsageError("--name: expected 1 to 100 letters, digits and . _ -")
    options = WatchOptions(
        client=ctx.find_object(Client) or Client(),
        redis_url=ctx.find_root().params.get("redis_url"),
        source=source or "",
        rules_file=rules,
        watcher=name,
        is_once=is_once,
        portion=portion,
        max_waiting=max_waiting,
        replicas=replicas,
        token_file=token_file,
        is_token_required=not has_no_token,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    )
    if is_unread:
        print_unread(options)
    elif is_check:
        check_all(options)
    else:
        run_watcher(options)
