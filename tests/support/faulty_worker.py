"""`python -m tests.support.faulty_worker`: a worker whose device does what the file FAULT_FILE says.

`hang`: a batch does not end while it says so. `wrong`, `nan`: the vectors are other ones, or none. No file: no fault.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

FAULT_FILE: Final = "FAULT_FILE"


def main() -> None:
    """Run the worker with that device."""
    import numpy as np  # noqa: PLC0415 in the worker's process only

    from shiwu_worker import __main__ as worker  # noqa: PLC0415 torch, only in the process that needs it
    from shiwu_worker.stages.encode import encoder as encode  # noqa: PLC0415 torch, only in the process that needs it

    path = Path(os.environ[FAULT_FILE])
    launch, collect = encode.Encoder.launch, encode.Encoder.collect

    def fault() -> str:
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def faulty_launch(self: Any, pixels: Any, rows: Sequence[int] | None = None) -> Any:
        pause = threading.Event()
        while fault() == "hang":
            pause.wait(0.05)
        return launch(self, pixels, rows)

    def faulty_collect(self: Any, batch: Any) -> Any:
        vectors = collect(self, batch)
        if (kind := fault()) in {"wrong", "nan"}:
            vectors = np.full_like(vectors, np.nan) if kind == "nan" else np.roll(vectors, 1, axis=1)
        return vectors

    encode.Encoder.launch, encode.Encoder.collect = faulty_launch, faulty_collect  # type: ignore[method-assign]  # the fault
    sys.argv = ["shiwu-worker"]
    worker.main()


if __name__ == "__main__":
    main()
