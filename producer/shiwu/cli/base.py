"""The command group `shiwu`: its options, errors and exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys
from enum import IntEnum
from typing import Any, NoReturn

import click
import redis

from shiwu.broker.redis_errors import explain, info_of
from shiwu.cli.sections import SectionedGroup
from shiwu.client.calls import DEFAULT_URL
from shiwu.client.client import Client
from shiwu.command_output import EXIT_OUTPUT, drop_output, interruptible, written_output
from shiwu.contract import RequestError, printable
from shiwu.entry import EXIT_INTERRUPTED
from shiwu.errors import RedisUrlError, ShiwuError


class Exit(IntEnum):
    """Exit codes, as listed by --help."""

    OK = 0
    NOT_TAGGED = 1
    USAGE = 2
    TIMEOUT = 3
    QUEUE = 4
    CONFIG = 64
    OUTPUT = EXIT_OUTPUT
    INTERRUPTED = EXIT_INTERRUPTED
    CLOSED_PIPE = 141


class Commands(SectionedGroup):
    """Reports the error of a command as one line and an exit code."""

    operations = frozenset({"dead", "labels", "migrate", "shards", "status", "sweep"})

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; characters that the terminal cannot encode are escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with written_output("shiwu"):
            return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments."""
        with interruptible("shiwu"):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except RequestError as error:
            end(f"{error.code}: {error}", Exit.USAGE)
        except RedisUrlError as error:
            end(f"{error.code}: SHIWU_REDIS_URL or --redis-url: {error}", Exit.CONFIG)
        except redis.RedisError as error:
            end(explain(error), Exit.CONFIG if info_of(error).ends_start else Exit.QUEUE)
        except ShiwuError as error:
            end(f"{error.code}: {error}", Exit.QUEUE)
        except KeyboardInterrupt:
            end("interrupted; what was enqueued goes on", Exit.INTERRUPTED)
        except BrokenPipeError:
            drop_output()
            sys.exit(int(Exit.CLOSED_PIPE))
        return result


def redis_url_of(ctx: click.Context) -> str:
    """The Redis URL of the command that runs: that of the option, or of the environment, or the default."""
    return ctx.find_root().params["redis_url"] or os.environ.get("SHIWU_REDIS_URL") or DEFAULT_URL


class _Echo(logging.Handler):
    """Writes what the library logs to standard error, as the commands' own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(f"shiwu: {printable(record.getMessage())}", err=True)


def end(message: str, code: Exit) -> NoReturn:
    """Print the reason in one line, and exit."""
    click.echo(f"shiwu: {printable(message)}", err=True)
    sys.exit(int(code))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--redis-url", envvar="SHIWU_REDIS_URL", show_envvar=True, help="Default redis://127.0.0.1:6379/0.")
@click.version_option(package_name="shiwu")
@click.pass_context
def main(ctx: click.Context, redis_url: str | None) -> None:
    """Tag images in the background.

    \b
    shiwu tag https://example.org/cat.jpg                    tag an image, wait, show the tags
    shiwu tag s3://images/a.jpg --labels 猫,狗,其他           with labels of your own
    shiwu enqueue --lane bulk - < references.txt             enqueue many images, do not wait
    shiwu results --group archive --follow                   print every answer as a JSON line
    shiwu gallery --jsonl answers.jsonl -o page.html         images, tags and times as one HTML page
    shiwu status                                             show queues and workers
    shiwu labels DIGEST                                      print the labels behind a digest
    shiwu cancel ID…                                         answer jobs `cancelled` now
    shiwu dead list                                          list jobs that ended without tags
    shiwu sweep                                              maintain the queue without a worker
    shiwu migrate                                            move a database of an earlier version

    \b
    Exit codes: 0 success, 1 an image was not tagged, 2 wrong usage, 3 no answer in time,
    4 Redis is unavailable or the queue is full, 64 the Redis URL or the server at it cannot work,
    74 the output cannot be written, 130 interrupted by Ctrl-C, 141 the reader of a pipe has exited.
    """
    log = logging.getLogger("shiwu")
    log.addHandler(echo := _Echo())
    ctx.call_on_close(lambda: log.removeHandler(echo))
    ctx.obj = ctx.with_resource(Client(redis_url))
