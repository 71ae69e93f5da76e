"""`python -m tests.support.deadly_worker`: a worker whose encoder aborts the process on a picture of one colour."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

DEADLY: Final = (255, 0, 255)


def main() -> None:
    """Run the worker with that encoder."""
    from shiwu_worker import __main__ as worker  # noqa: PLC0415 in the worker's process only
    from shiwu_worker.stages.encode import encoder as encode  # noqa: PLC0415 torch, only in the process that needs it

    real = encode.Encoder.launch

    def deadly(self: Any, pixels: Any, rows: Sequence[int] | None = None) -> Any:
        if any((pixels[row] == DEADLY).all() for row in rows or ()):
            os.abort()
        return real(self, pixels, rows)

    encode.Encoder.launch = deadly  # type: ignore[method-assign]  # the fault is injected here
    sys.argv = ["shiwu-worker"]
    worker.main()


if __name__ == "__main__":
    main()
