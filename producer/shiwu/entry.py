"""Where the commands `shiwu`, `shiwu-hooks` and `shiwu-worker` begin.

Their modules take some tenths of a second to import, and Ctrl-C within them would print a traceback of the interpreter.
So this module imports nothing but standard modules that are there anyway.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module

EXIT_INTERRUPTED = 130
"""The code that shells use for a program that Ctrl-C ended."""


def shiwu() -> None:
    """The command `shiwu`."""
    _run("shiwu.cli")


def shiwu_hooks() -> None:
    """The command `shiwu-hooks`."""
    _run("shiwu.hooks.__main__")


def shiwu_worker() -> None:
    """The command `shiwu-worker`."""
    _run("shiwu_worker.__main__")


def _run(module: str) -> None:
    """Import the module and call its `main`. Ctrl-C before the call ends the process in silence."""
    # Where a shell starts it in the background, the signal is ignored, and stays so.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        # No exception: libraries catch it, or wrap it, while they are imported.
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    main = import_module(module).main
    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
