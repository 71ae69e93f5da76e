"""A decoder that fails on marked images. Python imports this at its start in the processes of a worker under drill."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

if "shiwu_worker.loaders.fork_server_main" in sys.orig_argv:
    from shiwu_worker.loaders import sandbox

    STEP_BYTES = 64 << 20
    MAX_BYTES = 6 << 30
    _decode = getattr(sandbox, "decode")  # noqa: B009 a name that the module imports, and does not export

    def _fail_on_marks(data: bytes, *args: Any, **kwargs: Any) -> Any:
        end = bytes(data[-32:])
        if b"DRILL-ABORT" in end:
            os.abort()
        if b"DRILL-HANG" in end:
            time.sleep(3600)  # the injected hang
        if b"DRILL-MEMORY" in end:
            # Writes to the pages, because untouched pages take address space only. The memory limit of a loader must
            # end this first; an image that meets no limit is decoded, and the drill sees that it was tagged.
            hoard = [bytes(STEP_BYTES) for _ in range(MAX_BYTES // STEP_BYTES)]
            hoard.clear()
        return _decode(data, *args, **kwargs)

    setattr(sandbox, "decode", _fail_on_marks)  # noqa: B010 as above
