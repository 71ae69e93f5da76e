"""`python -m tests.support.stuck_worker`: a worker whose encode thread stops for ever at a picture of one colour."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

STUCK: Final = (0, 255, 255)


def main() -> None:
    """Run the worker with that encoder."""
    from shiwu_worker import __main__ as worker  # noqa: PLC0415 in the worker's process only
    from shiwu_worker.stages import encode  # noqa: PLC0415

    real = encode.Encoder.launch

    def stuck(self: Any, pixels: Any, rows: Sequence[int] | None = None) -> Any:
        if any((pixels[row] == STUCK).all() for row in rows or ()):
            threading.Event().wait()
        return real(self, pixels, rows)

    encode.Encoder.launch = stuck  # type: ignore[method-assign]  # the fault is injected here
    sys.argv = ["shiwu-worker"]
    worker.main()


if __name__ == "__main__":
    main()
