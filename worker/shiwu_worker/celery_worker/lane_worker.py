"""Celery's worker with `-Q` and `-X` read as the lanes that the pipeline serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from celery.apps.worker import Worker
from celery.utils.text import str_to_list

from shiwu.contract import Lane
from shiwu_worker.errors import ExitCode

ADMIN_QUEUE: Final = "shiwu.admin"
"""What Celery's own consumer listens on; nobody writes there."""


def choose_lanes(include: Sequence[str], exclude: Sequence[str], *, default: tuple[Lane, ...]) -> tuple[Lane, ...]:
    """The lanes that a command line chooses: those of `include`, or the default, without those of `exclude`.

    Raises:
        ValueError: a name is none of a lane, or no lane is left.
    """
    queues = {lane.queue: lane for lane in Lane}
    if unknown := sorted({*include, *exclude} - queues.keys() - {ADMIN_QUEUE}):
        raise ValueError(f"-Q and -X: expected {' or '.join(queues)}, got {', '.join(unknown)[:200]}")
    asked = [queues[name] for name in include if name in queues] or list(default)
    left = tuple(lane for lane in Lane if lane in asked and lane.queue not in exclude)
    if not left:
        raise ValueError(f"-Q and -X: expected at least one of {', '.join(queues)} to be served, got none")
    return left


class LaneWorker(Worker):  # type: ignore[misc]  # celery has no types
    """The worker that `celery -A shiwu_worker.app worker` starts."""

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Choose lanes; Celery's consumer listens on its own queue whatever they are."""
        conf = self.app.conf
        try:
            conf.shiwu_lanes = choose_lanes(
                str_to_list(include) or [], str_to_list(exclude) or [], default=conf.shiwu_lanes
            )
        except ValueError as error:
            print(error, file=sys.stderr)  # noqa: T201 the log is not set up yet
            raise SystemExit(int(ExitCode.CONFIG)) from None
        self.app.amqp.queues.select([ADMIN_QUEUE])
