"""What an image costs follows from its pixels and the model's size, not from its shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Final

MEASURE: Final = """
import io, json, os, sys
from PIL import Image
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import (decode, warm)

warm()
limits = DecodeLimits(max_pixels=50_000_000, max_side=65_535, formats=("JPEG", "PNG"))
specs = {
    "crop": ImageSpec(224, 224, "crop", 224, 3, (0.5,) * 3, (0.5,) * 3),
    "squash": ImageSpec(384, 384, "squash", None, 3, (0.5,) * 3, (0.5,) * 3),
}

def cost(data, spec, exact):
    # Each in a process of its own: the most memory that a process has had never becomes less.
    pid = os.fork()
    if pid == 0:
        for once in range(bool(data)):
            decode(data, spec=spec, limits=limits, is_exact=exact)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    return {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime, "mb": usage.ru_maxrss / 1024}

idle = cost(b"", None, False)["mb"]
for kind, width, height in json.loads(sys.argv[1]):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, kind)
    for name, spec in specs.items():
        for exact in (False, True):
            found = cost(file.getvalue(), spec, exact)
            found["mb"] -= idle
            print(json.dumps({"kind": kind, "size": [width, height], "spec": name, "exact": exact} | found), flush=True)
"""


def costs(*cases: tuple[str, int, int]) -> list[dict[str, object]]:
    """Status, CPU and memory of decoding files of these kinds and sizes, for a crop and a squash, fast and exact."""
    command = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_line_of_pixels_costs_little() -> None:
    """Resized before it is cropped, a line of 10,000 pixels would become an image of half a million columns."""
    lines = [("JPEG", 10_000, 1), ("PNG", 16_384, 1), ("PNG", 1, 16_384), ("JPEG", 1, 65_500), ("PNG", 65_535, 2)]
    found = costs(*lines)
    assert len(found) == 4 * len(lines)
    for one in found:
        assert one["status"] == 0, one
        assert float(str(one["cpu_s"])) < 0.5, one
        assert float(str(one["mb"])) < 150, one


def test_memory_depends_on_pixels_and_not_on_shape() -> None:
    """Twelve megapixels as a square and as the longest strips that are allowed."""
    found = costs(("PNG", 3464, 3464), ("PNG", 65_535, 183), ("PNG", 183, 65_535))
    assert all(one["status"] == 0 for one in found)
    for spec in ("crop", "squash"):
        for exact in (False, True):
            square, *strips = [float(str(one["mb"])) for one in found if (one["spec"], one["exact"]) == (spec, exact)]
            # A strip is resized in one direction first, to the model's width: 100 MB at most for 65,535 pixels.
            assert max(strips) < square + 120, (spec, exact, square, strips)
