"""The command `shiwu`: its errors, its exit codes, its options."""

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
from shiwu.client.client import Client
from shiwu.contract import RequestError, printable
from shiwu.errors import RedisUrlError, ShiwuError


class Exit(IntEnum):
    """Exit codes; --help lists them."""

    OK = 0
    NOT_TAGGED = 1
    USAGE = 2
    TIMEOUT = 3
    QUEUE = 4
    CONFIG = 64
    INTERRUPTED = 130
    CLOSED_PIPE = 141


class Commands(click.Group):
    """Turns the errors of all commands into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command from the command line, on a terminal of any encoding."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

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
            # The interpreter flushes standard output once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(int(Exit.CLOSED_PIPE))
        return result


class _Echo(logging.Handler):
    """Writes what the library logs to standard error, as the commands' own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(f"shiwu: {printable(record.getMessage())}", err=True)


def end(message: str, code: Exit) -> NoReturn:
    """Say why in one line, and leave."""
    click.echo(f"shiwu: {printable(message)}", err=True)
    sys.exit(int(code))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--redis-url", envvar="SHIWU_REDIS_URL", show_envvar=True, help="Default redis://127.0.0.1:6379/0.")
@click.version_option(package_name="shiwu")
@click.pass_context
def main(ctx: click.Context, redis_url: str | None) -> None:
    """Tag pictures in the background.

    \b
    shiwu tag https://example.org/cat.jpg                    ask, wait, show
    shiwu tag s3://pictures/a.jpg --labels 猫,狗,其他         with words of your own
    shiwu enqueue --lane bulk - < references.txt             ask about many, do not wait
    shiwu results --group archive --follow                   read every answer, as JSON lines
    shiwu gallery --jsonl answers.jsonl -o page.html         images, tags and times as one HTML page
    shiwu status                                             what waits, what runs
    shiwu labels DIGEST                                      the labels behind an answer's digest
    shiwu cancel ID…                                         nobody wants these any more
    shiwu dead list                                          what ended without tags, and why
    shiwu sweep                                              look after waiting jobs where no worker runs

    \b
    Exit codes: 0 all well, 1 a picture was not tagged, 2 wrong usage, 3 no answer in time,
    4 Redis not reachable or the queue is full, 64 the Redis URL or what listens there can never work,
    130 interrupted by Ctrl-C, 141 the reader of a pipe left.
    """
    log = logging.getLogger("shiwu")
    log.addHandler(echo := _Echo())
    ctx.call_on_close(lambda: log.removeHandler(echo))
    ctx.obj = ctx.with_resource(Client(redis_url))
