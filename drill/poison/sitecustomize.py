"""A decoder that breaks on marked pictures. Python imports this at its start in the processes of the drill `poison`."""

from __future__ import annotations

import os
import time
from typing import Any

if os.environ.get("DRILL_POISON"):
    from PIL import Image

    _open = Image.open

    def _poisoned(file: Any, *args: Any, **kwargs: Any) -> Any:
        end = bytes(file.getbuffer()[-32:]) if hasattr(file, "getbuffer") else b""
        if b"DRILL-ABORT" in end:
            os.abort()
        if b"DRILL-HANG" in end:
            time.sleep(3600)
        if b"DRILL-MEMORY" in end:
            hoard = bytearray(256 * 1024 * 1024)
            raise MemoryError(f"a drill, after {len(hoard)} bytes")
        return _open(file, *args, **kwargs)

    Image.open = _poisoned  # type: ignore[assignment]  # the same call, with a trap
