"""Starts everything, asks about every picture of the album, shows the answers. Exit code 1 when one is unexpected."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from tests.support.servers import PictureServer, S3Server, ServerError, Valkey, WorkerProcess

from demo.album import Entry, lay_out
from demo.report import Verdict, show_next, show_summary, show_table
from shiwu import Client, Lane

LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ANSWERS_S = 60.0
READY_S = 120.0
WORKER_STOPS_S = 10.0
WIDE = 140
PIPED = 120


def main() -> int:
    """Run the demo; whatever happens, nothing that it started is left running."""
    console = Console()
    console = Console(width=min(WIDE, console.width) if console.is_terminal else PIPED)
    for number in LEAVING:
        signal.signal(number, _leave)
    stack = ExitStack()
    try:
        return _run(console, stack)
    except ServerError as error:
        console.print(f"[bold red]The demo could not go on.[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        return 130
    finally:
        console.print("[dim]Stopping the worker and the servers …[/]")
        stack.close()


def _leave(*_: object) -> NoReturn:
    # A second Ctrl-C must not leave servers behind; every stop has a deadline of its own.
    for number in LEAVING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(console: Console, stack: ExitStack) -> int:
    began_s = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/]  {text}", highlight=False)

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shiwu-demo-")))
    valkey = stack.enter_context(Valkey(folder=folder / "valkey"))
    say(f"Valkey answers on {valkey.url}")
    s3 = stack.enter_context(S3Server(folder=folder / "s3"))
    say(f"S3 answers on {s3.endpoint_url}")
    http = stack.enter_context(PictureServer())
    # Whoever looks at the demo is the operator, who may know why.
    worker = WorkerProcess(redis_url=valkey.url, folder=folder, env=s3.env, allow_hosts=http.host, tell_refusals=True)
    stack.callback(worker.stop, timeout_s=WORKER_STOPS_S)
    worker.start()
    say(f"the worker, process {worker.pid}, loads the embedded model")
    album = lay_out(http=http, s3=s3, internal_url=f"http://127.0.0.1:{valkey.port}/latest/meta-data.jpg")
    say(f"{len(album)} pictures lie ready, over HTTP on {http.url('/')} and in s3://{s3.bucket}/")
    worker.wait_ready(timeout_s=READY_S)
    say("the worker is warm and claims\n")

    asked_s = time.monotonic()
    verdicts = _ask(valkey.url, album)
    took_s = time.monotonic() - asked_s
    show_table(console, verdicts)
    show_summary(console, verdicts, took_s=took_s)
    if all(verdict.is_expected for verdict in verdicts):
        show_next(console)
        return 0
    console.print(f"[bold red]Not every answer was as expected.[/] The end of the worker's log:\n{worker.log_tail()}")
    return 1


def _ask(redis_url: str, album: list[Entry]) -> list[Verdict]:
    """Enqueue every picture at once and wait for all answers."""
    with Client(redis_url) as client:
        references = [entry.reference for entry in album]
        ids = list(client.enqueue_many(references, labels="pictogram-zh", lane=Lane.INTERACTIVE))
        answers = dict(client.as_answered(ids, timeout_s=ANSWERS_S))
    return [Verdict(entry, answers.get(job_id)) for entry, job_id in zip(album, ids, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
