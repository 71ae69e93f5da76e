"""A few random schedules under NVIDIA's compute-sanitizer, which finds accesses outside of memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any, Final

from bench.card.measure import Measures, Skipped, need_cuda
from bench.card.race import play_all

SCHEDULES: Final = 30
LIMIT_S: Final = 55


def measures(*, tiny: bool) -> Measures:
    """The schedules under the sanitizer; a rehearsal plays some without it."""
    if tiny:
        yield "schedules", lambda: play_all("embedded", tiny=tiny, wanted=3, sizes=(1, 4))
    yield "memcheck", _memcheck


def _memcheck() -> dict[str, Any]:
    need_cuda()
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("needs compute-sanitizer")
    code = f"from bench.card.race import play_all; play_all('embedded', tiny=False, wanted={SCHEDULES}, sizes=(1, 4))"
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(
            f"expected no errors, got exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    return {"exit_code": done.returncode, "said": done.stdout.splitlines()[-1:]}
