"""Celery's remote control: `ping`, `stats` and `revoke` are answered, everything else is ignored.

The other commands of the channel (shutdown, pool_restart, …) could stop a worker with one PUBLISH.
"""

from __future__ import annotations

import os
import re
import time
from importlib.metadata import version
from typing import Any, Final

from celery.worker.consumer.control import Control
from celery.worker.pidbox import Pidbox
from celery.worker.state import total_count

from shiwu_worker.revoke import revoke_command

REPLY_EXCHANGE: Final = "reply.celery.pidbox"
"""Where Celery's `inspect` listens. A reply to any other exchange could write into a queue of somebody's choice."""
_REPLY_KEY: Final = re.compile(r"[0-9a-f-]{32,36}")
_STARTED_S: Final = time.monotonic()


class ControlBox(Pidbox):  # type: ignore[misc]  # celery has no types
    """A mailbox that knows three commands."""

    def __init__(self, consumer: Any) -> None:
        super().__init__(consumer)
        self.node.handlers = {"ping": _ping, "stats": _stats}
        if consumer.app.conf.shiwu_revoke:
            self.node.handlers["revoke"] = revoke_command

    def on_message(self, body: Any, message: Any) -> None:
        """Obey a known command whose reply goes to Celery's `inspect`, or to nobody."""
        if isinstance(body, dict) and body.get("method") in self.node.handlers and _is_reply_allowed(body):
            super().on_message(body, message)


class ControlStep(Control):  # type: ignore[misc]  # celery has no types
    """Takes the place of the remote control in Celery's consumer."""

    name = "Control"

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.box = ControlBox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown

    def include_if(self, consumer: Any) -> bool:
        """Always: an operator who does not listen to revokes still asks which workers run."""
        return True


def _is_reply_allowed(body: dict[str, Any]) -> bool:
    told = body.get("reply_to")
    if told is None:
        return True
    key = told.get("routing_key") if isinstance(told, dict) else None
    return (
        isinstance(told, dict)
        and told.get("exchange") == REPLY_EXCHANGE
        and isinstance(key, str)
        and _REPLY_KEY.fullmatch(key) is not None
    )


def _ping(_state: Any, **_: Any) -> dict[str, str]:
    return {"ok": "pong"}


def _stats(state: Any, **_: Any) -> dict[str, Any]:
    """What `celery inspect stats` and Flower show of a worker."""
    return {
        "total": dict(total_count),
        "pid": os.getpid(),
        "clock": str(state.app.clock),
        "uptime": round(time.monotonic() - _STARTED_S),
        "pool": {"implementation": "shiwu_worker.pipeline", "max-concurrency": 1, "processes": [os.getpid()]},
        "prefetch_count": 0,
        "shiwu": {"version": version("shiwu"), "lanes": [lane.queue for lane in state.app.conf.shiwu_lanes]},
    }
