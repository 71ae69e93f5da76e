"""What machine this is: driver, versions, compiler, and the state of the GPU."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench import machine
from bench.card.measure import NEEDS_CUDA, Measures, Skipped, need_cuda

WORDS: Final = ("driver", "cuda ver", "product", "mig", "xid", "remap", "clocks", "power limit", "sm  ")
MAX_LINES: Final = 60
FOLDERS: Final = ("/dev/shm", tempfile.gettempdir())  # noqa: S108 only its size is read


def measures(*, tiny: bool) -> Measures:
    """All facts; a rehearsal leaves nothing out."""
    del tiny
    yield "machine", lambda: asdict(machine.describe())
    yield "versions", lambda: {"python": platform.python_version(), **dict(machine.versions())}
    yield "programs", lambda: {name: shutil.which(name) for name in ("gcc", "nvcc", "ncu", "compute-sanitizer", "weed")}
    yield "system", _system
    yield "server", _server
    yield "torch", _torch
    yield "gpu", _gpu
    yield "nvidia-smi", lambda: _nvidia_smi("-q", words=WORDS)
    yield "topology", lambda: _nvidia_smi("topo", "-m")


def _system() -> dict[str, Any]:
    """What limits processes: a decoder's sandbox needs seccomp, pinned memory needs to be locked."""
    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in ("RLIMIT_NOFILE", "RLIMIT_MEMLOCK")}
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    return {
        "kernel": platform.version(),
        "user": os.getuid(),
        "limits": limits,
        "seccomp": actions.read_text(encoding="ascii").strip() if actions.is_file() else "missing",
        "free MiB": {folder: shutil.disk_usage(folder).free >> 20 for folder in FOLDERS},
    }


def _server() -> str:
    from tests.support.servers import Valkey  # noqa: PLC0415 if it fails, other facts are found

    with tempfile.TemporaryDirectory(prefix="card-facts-") as name, Valkey(folder=Path(name)) as server:
        return f"process {server.pid} answers"


def _torch() -> dict[str, Any]:
    import torch  # noqa: PLC0415 the other facts do not need it

    cudnn: Any = torch.backends.cudnn
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if cudnn.is_available() else None,
        "architectures": torch.cuda.get_arch_list(),
    }


def _gpu() -> dict[str, Any]:
    import torch  # noqa: PLC0415 the other facts do not need it

    from shiwu_worker.runtime import nvidia  # noqa: PLC0415 beside torch

    need_cuda()
    properties = torch.cuda.get_device_properties(0)
    return {
        "properties": str(properties),
        "uuid": str(properties.uuid),
        "driver": nvidia.driver_version(),
        "listed": [str(gpu) for gpu in nvidia.list_gpus()],
    }


def _nvidia_smi(*arguments: str, words: tuple[str, ...] = ()) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise Skipped(NEEDS_CUDA)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=15, check=False)
    lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    return [line for line in lines if not words or any(word in line.lower() for word in words)][:MAX_LINES]
