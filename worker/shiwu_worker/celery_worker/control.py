"""Celery's remote control: `ping`, `stats` and `revoke` are answered, everything else is ignored.

The other commands of the channel (shutdown, pool_restart, …) could stop a worker with one PUBLISH.
"""

from __future__ import annotations

import os
import re
import time
from importlib.metadata import version
from typing import Any, Final
from uuid import uuid4

from celery.worker.consumer.control import Control
from celery.worker.pidbox import Pidbox
from celery.worker.state import total_count

from shiwu_worker.celery_worker.revoke import revoke_command

REPLY_EXCHANGE: Final = "reply.celery.pidbox"
"""Where Celery's `inspect` listens. A reply to any other exchange could write into a queue of somebody's choice."""
_REPLY_KEY: Final = re.compile(r"[0-9a-f-]{32,36}")


HELLO: Final = "shiwu_hello"
"""A command that a worker broadcasts to itself. When it arrives the worker hears what others broadcast, too."""
HELLO_EVERY_S: Final = 0.25


class ControlBox(Pidbox):  # type: ignore[misc]  # celery has no types
    """A mailbox that knows three commands, and tells the app when it hears broadcasts and when it does not.

    A connection is made before Celery's loop subscribes on it; what is broadcast in between is lost.
    """

    def __init__(self, consumer: Any) -> None:
        super().__init__(consumer)
        self._hello = ""
        self._timer: Any = None
        self._started_s = time.monotonic()
        self.node.handlers = {"ping": _ping, "stats": self._stats}
        if consumer.app.conf.shiwu_revoke:
            self.node.handlers["revoke"] = revoke_command

    def start(self, c: Any) -> None:
        """Listen, and find out when the server has subscribed this worker."""
        super().start(c)
        self._hello = uuid4().hex
        if c.hub is None:
            c.app.shiwu_on_receiving_revokes(active=True)
        else:
            self._timer = c.hub.call_repeatedly(HELLO_EVERY_S, self._say_hello)

    def stop(self, c: Any) -> None:
        """Listen no more."""
        self._hello = ""
        self._stop_timer()
        c.app.shiwu_on_receiving_revokes(active=False)
        super().stop(c)

    def _say_hello(self) -> None:
        self.c.app.control.broadcast(
            HELLO,
            arguments={"token": self._hello},
            destination=[self.hostname],
            connection=self.c.connection,
            channel=self.node.channel,
        )

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _hear_hello(self, body: dict[str, Any]) -> None:
        told = body.get("arguments")
        if self._hello and isinstance(told, dict) and told.get("token") == self._hello:
            self._stop_timer()
            self.c.app.shiwu_on_receiving_revokes(active=True)

    def on_message(self, body: Any, message: Any) -> None:
        """Obey a known command whose reply goes to Celery's `inspect`, or to nobody."""
        if isinstance(body, dict) and body.get("method") == HELLO:
            self._hear_hello(body)
        elif isinstance(body, dict) and body.get("method") in self.node.handlers and _is_reply_allowed(body):
            super().on_message(body, message)

    def _stats(self, state: Any, **_: Any) -> dict[str, Any]:
        """What `celery inspect stats` and Flower show of a worker."""
        return {
            "total": dict(total_count),
            "pid": os.getpid(),
            "clock": str(state.app.clock),
            "uptime": round(time.monotonic() - self._started_s),
            "pool": {
                "implementation": "shiwu_worker.pipeline.pipeline",
                "max-concurrency": 1,
                "processes": [os.getpid()],
            },
            "prefetch_count": 0,
            "shiwu": {"version": version("shiwu"), "lanes": [lane.queue for lane in state.app.conf.shiwu_lanes]},
        }


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
