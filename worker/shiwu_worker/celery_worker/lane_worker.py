"""A Celery worker that reads `-Q` and `-X` as the lanes that the pipeline serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from celery.apps.worker import Worker
from celery.utils.text import str_to_list

from shiwu.contract import Lane
from shiwu_worker.errors import ExitCode

ADMIN_QUEUE: Final = "shiwu.admin"
"""The queue of Celery's own consumer; it stays empty."""


def choose_lanes(include: Sequence[str], exclude: Sequence[str], *, default: tuple[Lane, ...]) -> tuple[Lane, ...]:
    """Return the lanes of a command line: those of `include`, or the default, without those of `exclude`.

    Raises:
        ValueError: a name is not that of a lane, or no lane remains.
    """
    queues = {lane.queue: lane for lane in Lane}
    if unknown := sorted({*include, *exclude} - queues.keys() - {ADMIN_QUEUE}):
        raise ValueError(f"-Q and -X: expected {' or '.join(queues)}, got {', '.join(unknown)[:200]}")
    included = [queues[name] for name in include if name in queues] or list(default)
    served = tuple(lane for lane in Lane if lane in included and lane.queue not in exclude)
    if not served:
        raise ValueError(f"-Q and -X: expected at least one of {', '.join(queues)} to be served, got none")
    return served


class LaneWorker(Worker):  # type: ignore[misc]  # celery has no types
    """The worker that `celery -A shiwu_worker.app worker` starts."""

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Choose the lanes. Celery's consumer always listens on its own queue."""
        conf = self.app.conf
        try:
            conf.shiwu_lanes = choose_lanes(
                str_to_list(include) or [], str_to_list(exclude) or [], default=conf.shiwu_lanes
            )
        except ValueError as error:
            print(error, file=sys.stderr)  # noqa: T201 the log is not set up yet
            raise SystemExit(int(ExitCode.CONFIG)) from None
        self.app.amqp.queues.select([ADMIN_QUEUE])
