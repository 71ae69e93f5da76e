"""A lack of memory is reported as such, never as a damaged image: alone the image may fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import pictures

SWEEP: Final = """
import os, resource, sys
from pathlib import Path
from shiwu_worker.errors import Rejected
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import (decode, warm)

warm()
name, data = sys.argv[1], Path(sys.argv[2]).read_bytes()
limits = DecodeLimits(max_pixels=50_000_000, max_side=65_535, formats=(name,))
spec = ImageSpec(224, 224, "squash", None, 3, (0.5,) * 3, (0.5,) * 3)
for room_mb in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 120):
    if os.fork() == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (room_mb << 20),) * 2)
        found = "decoded"
        try:
            decode(data, spec=spec, limits=limits)
        except MemoryError:
            found = "no memory"
        except Rejected as error:
            found = str(error)
        print(found, flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status:
        print(f"ended with {status}", flush=True)
"""
FILES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "progressive JPEG": ("JPEG", {"progressive": True, "subsampling": 0}),
    "PNG": ("PNG", {"compress_level": 1}),
    "WebP": ("WEBP", {"method": 0}),
    "GIF": ("GIF", {}),
    "AVIF": ("AVIF", {"speed": 10}),
    "TIFF": ("TIFF", {"compression": "tiff_deflate"}),
}


@pytest.mark.parametrize("name", FILES)
def test_lack_of_memory_is_not_reported_as_damage(name: str, tmp_path: Path) -> None:
    """With less memory than each step of decoding needs, and with enough."""
    kind, options = FILES[name]
    path = tmp_path / "image"
    path.write_bytes(pictures.saved(pictures.picture().resize((1400, 1000)), kind, **options))
    # Memory that was given back is given back to the system, or the limit would not be felt.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SWEEP, kind, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    found = done.stdout.splitlines()
    assert len(found) == 21, done.stderr
    assert set(found) == {"no memory", "decoded"}, found
