"""Builds every part, sink first, on one ExitStack; closing then follows the data. Only it knows all rooms."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import redis
import structlog

from shiwu_worker.config import Settings
from shiwu_worker.errors import FatalError
from shiwu_worker.health import Health
from shiwu_worker.heartbeat import Heartbeat
from shiwu_worker.image_spec import read_image_spec
from shiwu_worker.job import Release
from shiwu_worker.logs import job_logger
from shiwu_worker.models import model_folder
from shiwu_worker.parts import (
    connect,
    make_claims,
    make_committer,
    make_limits,
    make_loaders,
    make_stages,
    open_encoder,
)
from shiwu_worker.pipeline import Pipeline
from shiwu_worker.settle import Away, Settler
from shiwu_worker.stages.claim import Claims, Doorbell

log: Any = structlog.get_logger()
DOORBELL_S = 5.0
START_S = 60.0
LOADERS_STOP_S = 5.0


class Service:
    """A running worker: claims from `open_service` until `stop`."""

    def __init__(self, *, pipeline: Pipeline, stop: Callable[[float], None], ready_after_s: float) -> None:
        self._pipeline = pipeline
        self._stop = stop
        self.ready_after_s = ready_after_s

    def stop(self, *, grace_s: float) -> None:
        """Drain within the grace time and give back what is left. The first call counts."""
        self._stop(grace_s)

    def hurry(self) -> None:
        """Give back at once; for a second signal."""
        self._pipeline.hurry()


@contextmanager
def open_service(settings: Settings, *, on_fatal: Callable[[FatalError], None]) -> Iterator[Service]:
    """Load the model, start all parts, claim; on leaving, stop in the direction of the data.

    Raises:
        FatalError: when a part can't start. Nothing has been claimed then.
    """
    began_s = time.monotonic()
    # The name lets an operator see who holds a claim; '|' parts the fields of a claim's record.
    token = f"{settings.worker_name.replace('|', '-')}.{secrets.token_hex(4)}"
    health = Health(ready_file=settings.ready_file, alive_file=settings.alive_file, stuck_s=settings.stuck_s)
    health.ready(is_ready=False)
    with ExitStack() as stack:
        client = stack.enter_context(connect(settings))
        doorbell = Doorbell(stack.enter_context(connect(settings, block_s=DOORBELL_S)), block_s=DOORBELL_S)
        claims = make_claims(settings, client, token)
        folder = model_folder(settings.model)
        spec = read_image_spec(folder)
        loaders = make_loaders(
            settings,
            spec,
            on_loaded=lambda results: pipeline.loaded(results),  # noqa: PLW0108 bound when it is called
            on_fatal=on_fatal,
        )
        stack.callback(loaders.close, LOADERS_STOP_S)
        loaders.start(START_S)
        settler = Settler(
            committer=make_committer(settings, client, token),
            claims=claims,
            worker=settings.worker_name,
            on_settled=lambda jobs: pipeline.settled(jobs),  # noqa: PLW0108 bound when it is called
            log_job=job_logger(level=settings.log_level),
            on_fatal=on_fatal,
        )
        encoder = open_encoder(settings, folder, spec)
        stages = make_stages(
            settings, claims=claims, doorbell=doorbell, loaders=loaders, encoder=encoder, settler=settler
        )
        pipeline = Pipeline(stages, make_limits(settings), on_fatal=on_fatal)
        alive = health.alive_while(lambda: pipeline.progress_s, lambda: bool(pipeline.held()))
        heartbeat = Heartbeat(claims, lease_s=settings.lease_s, held=pipeline.held, alive=alive, away=Away("heartbeat"))

        def stop(grace_s: float) -> None:
            """Intake first, leases last: whoever holds a job keeps its lease until it is answered or given back."""
            health.ready(is_ready=False)
            give_back(claims, pipeline.stop(grace_s=grace_s))
            settler.close(timeout_s=settings.redis_timeout_s * 2)
            heartbeat.close()

        once = _Once(stop)
        stack.callback(once, settings.grace_s)
        settler.start()
        doorbell.start()
        heartbeat.start()
        pipeline.start()
        health.ready(is_ready=True)
        yield Service(pipeline=pipeline, stop=once, ready_after_s=round(time.monotonic() - began_s, 3))


def give_back(claims: Claims, left: Sequence[Release]) -> None:
    """Return jobs to the front of their lanes; where Redis is away, their leases will."""
    try:
        if left:
            log.info("gave_back", jobs=claims.release(left))
    except redis.RedisError as error:
        log.error("not_given_back", jobs=len(left), error=str(error)[:300])


class _Once:
    """A stop that two paths may ask for and one call carries out."""

    def __init__(self, stop: Callable[[float], None]) -> None:
        self._stop: Callable[[float], None] | None = stop

    def __call__(self, grace_s: float) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            stop(grace_s)
