"""Plans the workers of one machine: a GPU, the CPUs near it, and an environment for each."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shiwu_worker.config.settings import Settings
from shiwu_worker.launcher.gpus import choose_gpus, find_gpus
from shiwu_worker.runtime.cpus import cores_of
from shiwu_worker.runtime.nvidia import Gpu

HTTP_PORT: Final = "SHIWU_HTTP_PORT"


class PlacementError(ValueError):
    """Options and settings contradict each other; the text says what was expected."""


@dataclass(frozen=True)
class Placement:
    """The GPU, CPUs, names and files that the launcher assigns to one worker."""

    name: str
    """`gpu0`, or `gpu0-1` for the second worker on it."""
    node: str
    """Celery's node name."""
    cpus: frozenset[int]
    environment: Mapping[str, str]
    """Environment variables that differ from those of the launcher."""
    ready_file: Path | None = None
    alive_file: Path | None = None
    gpu_uuid: str | None = None
    """Of the whole GPU, also where the worker has one MIG instance of it; None for the CPU."""


def plan_placements(settings: Settings, *, asked: str, per_gpu: int) -> list[Placement]:
    """Return a placement for each worker of this machine; an empty list without a GPU.

    Args:
        settings: of all workers.
        asked: `all`, or the GPUs by number, UUID or `cpu:N`.
        per_gpu: workers on each GPU.

    Raises:
        UnknownGpu: `asked` names a GPU that this machine does not have.
        PlacementError: settings and options contradict each other.
    """
    is_device_open = settings.device in {"auto", "cuda"}
    if asked != "all" and not is_device_open and settings.device != "cpu":
        raise PlacementError(f"expected --gpus with SHIWU_DEVICE=auto, got SHIWU_DEVICE={settings.device}")
    # With a device in the settings there is nothing to discover.
    found = find_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")) if is_device_open else []
    gpus = choose_gpus(found, asked)
    if per_gpu > 1 and not gpus:
        raise PlacementError("expected --per-gpu only if a GPU is visible, or with --gpus cpu:0")
    return make_placements(
        [gpu for gpu in gpus for _ in range(per_gpu)],
        settings=settings,
        environment=os.environ,
        cpus=frozenset(os.sched_getaffinity(0)),
    )


def make_placements(
    gpus: Sequence[Gpu], *, settings: Settings, environment: Mapping[str, str], cpus: frozenset[int]
) -> list[Placement]:
    """Return a placement for each item; a GPU that occurs more than once is shared by its workers.

    Args:
        gpus: one item for each worker.
        settings: of all workers.
        environment: of the launcher.
        cpus: the usable CPUs; divided among the workers whose GPU does not know which CPUs are near.
    """
    shares = share_out([gpu.near_cpus or cpus for gpu in gpus])
    host = socket.gethostname()
    placements = []
    for index, (gpu, share) in enumerate(zip(gpus, shares, strict=True)):
        before = gpus[:index].count(gpu)
        name = f"{gpu.name}-{before}" if gpus.count(gpu) > 1 else gpu.name
        ready, alive = (_file_of_worker(path, name) for path in (settings.ready_file, settings.alive_file))
        is_named = "worker_name" in settings.model_fields_set
        own = {
            "CUDA_VISIBLE_DEVICES": gpu.uuid or "",
            "SHIWU_DEVICE": "cuda" if gpu.uuid else "cpu",
            "SHIWU_WORKER_NAME": f"{settings.worker_name if is_named else host}-{name}",
        }
        if (port := environment.get(HTTP_PORT, "0").strip()).isdecimal() and int(port):
            own[HTTP_PORT] = str(int(port) + index)
        own |= {"SHIWU_READY_FILE": str(ready)} if ready else {}
        own |= {"SHIWU_ALIVE_FILE": str(alive)} if alive else {}
        placements.append(Placement(name, f"shiwu@{host}-{name}", share, own, ready, alive, gpu.gpu_uuid or None))
    return placements


def share_out(
    near: Sequence[frozenset[int]], *, cores: Callable[[frozenset[int]], list[frozenset[int]]] = cores_of
) -> list[frozenset[int]]:
    """Divide each set of CPUs evenly among its workers; a set with fewer CPUs than workers goes whole to each.

    CPUs of one core stay together where there are enough cores: two workers on one core would slow each other down.

    Args:
        cores: groups CPUs by their core.
    """
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for worker, cpus in enumerate(near):
        groups[cpus].append(worker)
    shares = list(near)
    for cpus, workers in groups.items():
        ordered = cores(cpus)
        if len(ordered) < len(workers):
            ordered = [frozenset({cpu}) for cpu in sorted(cpus)]
        for nth, worker in enumerate(workers):
            part = ordered[nth * len(ordered) // len(workers) : (nth + 1) * len(ordered) // len(workers)]
            shares[worker] = frozenset().union(*part) if len(ordered) >= len(workers) else cpus
    return shares


def _file_of_worker(path: Path | None, name: str) -> Path | None:
    return path.with_name(f"{path.name}.{name}") if path else None
