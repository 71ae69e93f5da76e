"""Whether the model can be compiled here, and what is said where it cannot.

inductor builds C++ for a CPU. For a GPU Triton builds its kernels itself, and their launchers with a C compiler. What
was built is kept in TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, and found again by a later start.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.towers import Tower, compiled_tower

log: FilteringBoundLogger = structlog.get_logger()
EAGER: Final = "the model runs as it is, which is slower and gives the same answers"


def cpu_tower(eager: Tower, *, may_compile: bool) -> tuple[Tower, bool]:
    """The tower of a CPU, and whether it is compiled: not, with a log line, where there is no compiler."""
    if not may_compile:
        return eager, False
    if reason := why_no_cpp_compiler():
        log.warning("model_not_compiled", reason=reason, meaning=EAGER)
        return eager, False
    return compiled_tower(eager), True


def why_no_cpp_compiler() -> str | None:
    """What is missing for compiling on a CPU; None if nothing is."""
    compiler = os.environ.get("CXX") or "g++"
    return (
        None if shutil.which(compiler) else f"expected a C++ compiler ({compiler}), got none; inductor builds with it"
    )


def why_no_compiler() -> str | None:
    """What is missing for compiling on a GPU; None if nothing is."""
    compilers = (os.environ.get("CC") or "gcc", "cc", "clang")
    if not any(map(shutil.which, compilers)):
        return f"expected a C compiler ({', '.join(compilers)}), got none; Triton builds its launchers with it"
    if find_spec("triton") is None:
        return "expected the package triton, which torch's wheels for CUDA bring along, got none"
    return None


def described(error: Exception) -> str:
    """An error of a compiler as a log line has it: its first lines, which name the cause."""
    return f"{type(error).__name__}: {error}"[:300]
