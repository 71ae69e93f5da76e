"""A decoder that breaks on marked pictures. Python imports this at its start in the processes of the drill `poison`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

if "shiwu_worker.loaders.fork_server_main" in sys.orig_argv:
    from PIL import Image

    STEP_BYTES = 64 << 20
    MAX_BYTES = 6 << 30
    _open = Image.open

    def _poisoned(file: Any, *args: Any, **kwargs: Any) -> Any:
        end = bytes(file.getbuffer()[-32:]) if hasattr(file, "getbuffer") else b""
        if b"DRILL-ABORT" in end:
            os.abort()
        if b"DRILL-HANG" in end:
            time.sleep(3600)  # the hang that is asked for
        if b"DRILL-MEMORY" in end:
            # Until there is no more: pages that are never touched cost address space alone. The limit of a loader must
            # come first; a picture that meets none is opened, and the drill sees that it was tagged.
            hoard = [bytes(STEP_BYTES) for _ in range(MAX_BYTES // STEP_BYTES)]
            hoard.clear()
        return _open(file, *args, **kwargs)

    Image.open = _poisoned  # type: ignore[assignment]  # the same call, with a trap
