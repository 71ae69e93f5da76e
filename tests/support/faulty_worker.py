"""`python -m tests.support.faulty_worker`: a worker whose device does what the file FAULT_FILE says.

`hang`: a batch does not end while it says so. `wrong`, `nan`: the vectors are other ones, or none. `assert`: a kernel
of another thread accesses memory out of bounds, after which CUDA refuses all calls; on a CPU its error is raised.
`item`, at the start: the image tower reads a number back to the host, so no graph can be captured. No file: no fault.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.support.planted_item import with_item

FAULT_FILE: Final = "FAULT_FILE"


def main() -> None:
    """Run the worker with that device."""
    import numpy as np  # noqa: PLC0415 in the worker's process only

    from shiwu_worker import __main__ as worker  # noqa: PLC0415 torch, only in the process that needs it
    from shiwu_worker.stages.encode import encoder as encode  # noqa: PLC0415 torch, only in the process that needs it
    from shiwu_worker.stages.encode.model import DeviceModel  # noqa: PLC0415 as the line before

    path = Path(os.environ[FAULT_FILE])
    launch, collect = encode.Encoder.launch, encode.Encoder.collect

    def fault() -> str:
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def faulty_launch(self: Any, pixels: Any, rows: Sequence[int] | None = None) -> Any:
        pause = threading.Event()
        while fault() == "hang":
            pause.wait(0.05)
        if fault() == "assert":
            break_device()
        return launch(self, pixels, rows)

    def faulty_collect(self: Any, batch: Any) -> Any:
        vectors = collect(self, batch)
        if (kind := fault()) in {"wrong", "nan"}:
            vectors = np.full_like(vectors, np.nan) if kind == "nan" else np.roll(vectors, 1, axis=1)
        return vectors

    if fault() == "item":
        DeviceModel.eager_tower = with_item(DeviceModel.eager_tower)  # type: ignore[assignment,method-assign]  # the fault
    encode.Encoder.launch, encode.Encoder.collect = faulty_launch, faulty_collect  # type: ignore[method-assign]  # the fault
    sys.argv = ["shiwu-worker"]
    worker.main()


def break_device() -> None:
    """Leave the context of the GPU in an error that lasts, or raise that error on a CPU."""
    import torch  # noqa: PLC0415 in the worker's process only

    if not torch.cuda.is_available():
        raise RuntimeError("CUDA error: device-side assert triggered")

    def access() -> None:
        numbers = torch.zeros(1, device="cuda")
        torch.index_select(numbers, 0, torch.tensor([10**6], device="cuda"))

    thread = threading.Thread(target=access, name="break-device")
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
