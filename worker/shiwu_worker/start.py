"""Starts the worker in this process, or a launcher that starts one for each of several cards."""

from __future__ import annotations

import os
import socket

import click

from shiwu_worker import solo
from shiwu_worker.cards import UnknownCard
from shiwu_worker.config import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.health import Health
from shiwu_worker.launcher import AFTER_GRACE_S, Launcher, Patience
from shiwu_worker.places import Place, WrongPlaces, choose_places


def start_workers(*, gpus: str, per_gpu: int, task_events: bool) -> int:
    """Work until the workers have ended; the exit code of the launcher. A single worker ends the process by itself.

    Args:
        gpus: `all`, or the cards by number, UUID or `cpu:N`.
        per_gpu: workers on each card.
        task_events: send Celery's task events.
    """
    settings = solo.begin()
    try:
        places = choose_places(settings, asked=gpus, per_gpu=per_gpu)
    except (UnknownCard, WrongPlaces) as error:
        click.echo(str(error), err=True)
        return int(ExitCode.CONFIG)
    if len(places) > 1:
        return _launch(settings, places, task_events=task_events)
    if gpus != "all":
        os.environ |= {name: places[0].environment[name] for name in ("CUDA_VISIBLE_DEVICES", "SHIWU_DEVICE")}
    # All CPUs are its own, the far ones too: nobody else here needs them.
    node = places[0].node if places else f"shiwu@{socket.gethostname()}"
    solo.run(node=node, task_events=task_events)
    return int(ExitCode.OK)


def _launch(settings: Settings, places: list[Place], *, task_events: bool) -> int:
    drain_s = settings.grace_s + AFTER_GRACE_S

    def command(place: Place) -> list[str]:
        return solo.command(node=place.node, cpus=place.cpus, drain_s=drain_s, task_events=task_events)

    health = Health(ready_file=settings.ready_file, alive_file=settings.alive_file)
    return Launcher(places, command=command, patience=Patience(drain_s=drain_s), health=health).run()
