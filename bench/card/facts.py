"""What machine this is: driver, versions, compiler, and the state of the GPU."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict
from typing import Any, Final

from bench import machine
from bench.card.measure import NEEDS_CUDA, Measures, Skipped, need_cuda

WORDS: Final = ("driver", "cuda ver", "product", "mig", "xid", "remap", "clocks", "power limit", "sm  ")
MAX_LINES: Final = 60


def measures(*, tiny: bool) -> Measures:
    """All facts; a rehearsal leaves nothing out."""
    del tiny
    yield "machine", lambda: asdict(machine.describe())
    yield "versions", lambda: {"python": platform.python_version(), **dict(machine.versions())}
    yield "programs", lambda: {name: shutil.which(name) for name in ("gcc", "nvcc", "ncu", "compute-sanitizer", "weed")}
    yield "torch", _torch
    yield "gpu", _gpu
    yield "nvidia-smi", lambda: _nvidia_smi("-q", words=WORDS)
    yield "topology", lambda: _nvidia_smi("topo", "-m")


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
