"""Starts everything, asks about every image, shows the answers and makes a page of them.

Exit code 1 when an answer is unexpected or the page cannot be made.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from tests.support.servers import PictureServer, S3Server, ServerError, Valkey, WorkerProcess

from demo.album import Entry, lay_out
from demo.gallery import PAGE, write_page
from demo.own_images import SUFFIXES, OwnImages, find_images
from demo.report import Result, count_of, show_next, show_page, show_summary, show_table
from shiwu import Client, Lane
from shiwu.contract import printable_lines

LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ANSWERS_S = 60.0
READY_S = 120.0
EMBEDDED = {"SHIWU_MODEL": "", "SHIWU_LABELS_DIR": "", "SHIWU_DEFAULT_LABELS": "", "SHIWU_TORCH_THREADS": "0"}
"""In place of what the tests set: the embedded model with its default labels and all cores."""
MODEL_READY_S = 1800.0
"""A model may have to be downloaded."""
WORKER_STOPS_S = 10.0
WIDE = 140
PIPED = 120


def main() -> int:
    """Run the demo; whatever happens, nothing that it started is left running."""
    options = _options()
    console = Console()
    console = Console(width=min(WIDE, console.width) if console.is_terminal else PIPED)
    for number in LEAVING:
        signal.signal(number, _leave)
    stack = ExitStack()
    try:
        return _run(console, stack, options)
    except ServerError as error:
        console.print(f"[bold red]The demo could not go on.[/] {escape(printable_lines(str(error)))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        return 130
    finally:
        console.print("[dim]Stopping the worker and the servers …[/]")
        stack.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="Tag images with real servers and one worker.")
    parser.add_argument("images", nargs="*", type=Path, help="folders or files of your own; default: the samples")
    parser.add_argument("--model", help="folder or hub id, as SHIWU_MODEL takes it; default: the embedded model")
    parser.add_argument("--labels", help="name of a label set; default: the worker's own")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page with the images is written")
    options = parser.parse_args()
    if gone := [str(path) for path in options.images if not path.exists()]:
        parser.error(f"expected folders or files that exist, got {', '.join(gone)}")
    try:
        options.own = find_images(options.images)
    except ValueError as error:
        parser.error(str(error))
    if options.images and not options.own.entries:
        where = ", ".join(map(str, options.images))
        parser.error(f"expected images in {where}, got no file whose name ends with {', '.join(sorted(SUFFIXES))}")
    return options


def _leave(*_: object) -> NoReturn:
    # A second Ctrl-C must not leave servers behind; every stop has a deadline of its own.
    for number in LEAVING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(console: Console, stack: ExitStack, options: argparse.Namespace) -> int:
    began_s = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/]  {escape(printable_lines(text))}", highlight=False)

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shiwu-demo-")))
    valkey = stack.enter_context(Valkey(folder=folder / "valkey"))
    say(f"Valkey answers on {valkey.url}")
    # The demo is run by the operator, who may know why.
    settings = EMBEDDED | {"SHIWU_TELL_REFUSALS": "true"} | _model_settings(options.model)
    make_album: Callable[[], list[Entry]]
    own: OwnImages = options.own
    if own.entries:
        settings |= own.settings
        make_album = partial(list, own.entries)
    else:
        s3 = stack.enter_context(S3Server(folder=folder / "s3"))
        say(f"S3 answers on {s3.endpoint_url}")
        http = stack.enter_context(PictureServer())
        settings |= s3.env | {"SHIWU_ALLOW_HOSTS": http.host}
        make_album = partial(
            lay_out, http=http, s3=s3, internal_url=f"http://127.0.0.1:{valkey.port}/latest/meta-data.jpg"
        )
    worker = WorkerProcess(redis_url=valkey.url, folder=folder, env=settings)
    stack.callback(worker.stop, timeout_s=WORKER_STOPS_S)
    worker.start()
    say(f"the worker, process {worker.pid}, loads {options.model or 'the embedded model'}")
    album = make_album()  # while the model loads
    say(f"{count_of(album)} {'lies' if len(album) == 1 else 'lie'} ready{own.left_out}")
    worker.wait_ready(timeout_s=MODEL_READY_S if options.model else READY_S)
    say("the worker is warm and claims\n")

    asked_s = time.monotonic()
    results = _ask(valkey.url, album, labels=options.labels)
    took_s = time.monotonic() - asked_s
    show_table(console, results)
    show_summary(console, results, took_s=took_s)
    answers = [result.answer for result in results if result.answer]
    page = write_page(answers, options.page, settings=settings) if answers else None
    show_page(console, page)
    if all(result.is_expected for result in results):
        show_next(console)
        return 0 if page else 1
    console.print("[bold red]Not every answer was as expected.[/] The end of the worker's log:")
    console.print(printable_lines(worker.log_tail()), markup=False, emoji=False, highlight=False)
    return 1


def _model_settings(model: str | None) -> dict[str, str]:
    """The worker's variables for a model that is not the embedded one; a hub id may have to be downloaded."""
    if model is None:
        return {}
    hub = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return {"HF_HUB_OFFLINE": "0", **hub, "SHIWU_MODEL": model}


def _ask(redis_url: str, album: list[Entry], *, labels: str | None) -> list[Result]:
    """Enqueue all images and wait for all answers."""
    with Client(redis_url) as client:
        references = [entry.reference for entry in album]
        ids = list(client.enqueue_many(references, labels=labels, lane=Lane.INTERACTIVE))
        answers = dict(client.as_answered(ids, timeout_s=ANSWERS_S + len(album)))
    return [Result(entry, answers.get(job_id)) for entry, job_id in zip(album, ids, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
