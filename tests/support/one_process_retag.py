"""`python -m tests.support.one_process_retag`: the command `retag` with the text tower in its own process.

The process that the command starts for it imports torch anew, five CPU seconds, to have given back its memory before
vectors are read. What else the command does is the same without it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command."""
    from shiwu_worker import __main__ as worker  # noqa: PLC0415 in the command's process only
    from shiwu_worker.retag import command  # noqa: PLC0415 as the line before
    from shiwu_worker.retag.label_texts import prepare  # noqa: PLC0415 as the line before

    command.prepare_labels = prepare  # type: ignore[attr-defined]  # replaced here on purpose
    sys.argv = ["shiwu-worker", "retag", *sys.argv[1:]]
    worker.main()


if __name__ == "__main__":
    main()
