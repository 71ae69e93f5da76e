"""Starts the worker in this process, or a launcher that starts one worker for each of several GPUs."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

import click

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.health.probe_files import ProbeFiles
from shiwu_worker.launcher.gpus import UnknownGpu
from shiwu_worker.launcher.placement import Placement, PlacementError, plan_placements
from shiwu_worker.launcher.supervisor import RestartPolicy, Supervisor
from shiwu_worker.runtime.nvidia import fault_of

MIN_HUNG_S: Final = 60.0
HUNG_TIMEOUTS: Final = 12
"""A worker that waits for Redis touches its alive file at least once in this many of its time-outs."""
LOADERS_END_S: Final = 5.0
TRACES_END_S: Final = 3.0


class RunWorker(Protocol):
    """Runs the worker in this process, and ends the process."""

    def __call__(self, *, node: str) -> None:
        """Run the worker under this Celery node name."""


class WorkerCommand(Protocol):
    """Makes the command line of a worker process."""

    def __call__(self, *, node: str, cpus: frozenset[int], drain_s: float) -> list[str]:
        """Return the program and its arguments."""


def start_workers(settings: Settings, *, gpus: str, per_gpu: int, run: RunWorker, command: WorkerCommand) -> int:
    """Run until all workers have exited, and return the exit code. A single worker exits the process itself.

    Args:
        gpus: `all`, or the GPUs by number, UUID or `cpu:N`.
        per_gpu: workers on each GPU.
        run: runs the only worker in this process.
        command: makes the command line of one of several workers.
    """
    try:
        placements = plan_placements(settings, asked=gpus, per_gpu=per_gpu)
    except (UnknownGpu, PlacementError) as error:
        click.echo(str(error), err=True)
        return int(ExitCode.CONFIG)
    if len(placements) > 1:
        return _launch(settings, placements, command)
    if gpus != "all":
        os.environ |= {name: placements[0].environment[name] for name in ("CUDA_VISIBLE_DEVICES", "SHIWU_DEVICE")}
    # The only worker uses all CPUs, also those far from its GPU.
    run(node=placements[0].node if placements else f"shiwu@{socket.gethostname()}")
    return int(ExitCode.OK)


def after_grace_s(settings: Settings) -> float:
    """How long a worker may take after its grace time; the chart counts the same."""
    return 2 * settings.redis_timeout_s + LOADERS_END_S + TRACES_END_S


def _launch(settings: Settings, placements: Sequence[Placement], command: WorkerCommand) -> int:
    drain_s = settings.grace_s + after_grace_s(settings)
    hung_after_s = max(MIN_HUNG_S, HUNG_TIMEOUTS * settings.redis_timeout_s)
    probe_files = ProbeFiles(ready_file=settings.ready_file, alive_file=settings.alive_file)
    with tempfile.TemporaryDirectory(prefix="shiwu-") as folder:
        return Supervisor(
            [_with_alive_file(placement, Path(folder)) for placement in placements],
            command=lambda placement: command(node=placement.node, cpus=placement.cpus, drain_s=drain_s),
            restart_policy=RestartPolicy(
                drain_s=drain_s, after_grace_s=after_grace_s(settings), hung_after_s=hung_after_s
            ),
            probe_files=probe_files,
            fault_of=fault_of,
            has_files=settings.labels_dir is not None,
        ).run()


def _with_alive_file(placement: Placement, folder: Path) -> Placement:
    """The placement, with an alive file in this folder if the operator asked for none."""
    if placement.alive_file is not None:
        return placement
    path = folder / placement.name
    return replace(placement, alive_file=path, environment={**placement.environment, "SHIWU_ALIVE_FILE": str(path)})
