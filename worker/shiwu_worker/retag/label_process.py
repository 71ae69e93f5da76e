"""Runs the text tower in a process of its own, and starts reading vectors when all memory of that process is free.

`python -m shiwu_worker.retag.label_process` is that process. Imports nothing heavy: while it has its most memory, the
process that waits is to have little.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Final

from shiwu_worker.retag.options import RetagOptions

if TYPE_CHECKING:
    from shiwu_worker.retag.label_texts import Failure, Prepared

COMMAND: Final = (sys.executable, "-m", "shiwu_worker.retag.label_process")
"""Gets the options on standard input and writes what scoring needs to standard output, both pickled."""


def prepare_labels(options: RetagOptions) -> Prepared | Failure:
    """Encode all labels, and return what scoring needs. Takes as long as the model takes.

    Raises:
        SystemExit: the process has ended with this code, and has printed why.
    """
    done = subprocess.run(COMMAND, input=pickle.dumps(options), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: Prepared | Failure = pickle.loads(done.stdout)  # noqa: S301 a process of this command made it
    return result


def main() -> None:
    """Be the process that encodes labels."""
    options = pickle.load(sys.stdin.buffer)  # noqa: S301 the process that waits made it
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as output:
        # Whatever a library prints, also past Python, is no part of the result.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        with redirect_stdout(sys.stderr):
            from shiwu_worker.retag.label_texts import prepare  # noqa: PLC0415 as the module says

            output.write(pickle.dumps(prepare(options)))


if __name__ == "__main__":
    main()
