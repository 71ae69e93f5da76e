"""Celery's remote control: answers `ping`, `stats` and `revoke`, and ignores every other command.

The other commands (shutdown, pool_restart, …) would let one PUBLISH stop a worker.
"""

from __future__ import annotations

import os
import re
import time
from importlib.metadata import version
from typing import Any, Final
from uuid import uuid4

from celery.worker.consumer.connection import Connection
from celery.worker.consumer.control import Control
from celery.worker.consumer.tasks import Tasks
from celery.worker.pidbox import Pidbox
from celery.worker.state import total_count

from shiwu_worker.celery_worker.revoke import revoke_command

REPLY_EXCHANGE: Final = "reply.celery.pidbox"
"""Where Celery's `inspect` listens. With any other exchange a message could choose the queue of the reply."""
_REPLY_KEY: Final = re.compile(r"[0-9a-f-]{32,36}")


HELLO: Final = "shiwu_hello"
"""A command that a worker broadcasts to itself. Once it arrives, other broadcasts arrive too."""
HELLO_EVERY_S: Final = 0.25


class ControlBox(Pidbox):  # type: ignore[misc]  # celery has no types
    """A mailbox with three commands, which reports to the app whether broadcasts are received.

    Broadcasts between the connection and the subscription of Celery's loop are lost, so being connected is not enough.
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
        """Start listening, and broadcast a hello until it arrives."""
        super().start(c)
        self._hello = uuid4().hex
        if c.hub is None:
            c.app.shiwu_on_receiving_revokes(active=True)
        else:
            self._timer = c.hub.call_repeatedly(HELLO_EVERY_S, self._send_hello)

    def stop(self, c: Any) -> None:
        """Stop listening."""
        self._hello = ""
        self._stop_timer()
        c.app.shiwu_on_receiving_revokes(active=False)
        super().stop(c)

    def _send_hello(self) -> None:
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

    def _receive_hello(self, body: dict[str, Any]) -> None:
        arguments = body.get("arguments")
        if self._hello and isinstance(arguments, dict) and arguments.get("token") == self._hello:
            self._stop_timer()
            self.c.app.shiwu_on_receiving_revokes(active=True)

    def on_message(self, body: Any, message: Any) -> None:
        """Run a known command whose reply, if any, goes to Celery's `inspect`."""
        if isinstance(body, dict) and body.get("method") == HELLO:
            self._receive_hello(body)
        elif isinstance(body, dict) and body.get("method") in self.node.handlers and _is_reply_allowed(body):
            super().on_message(body, message)

    def _stats(self, state: Any, **_: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` and Flower show of a worker."""
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


class TasksStep(Tasks):  # type: ignore[misc]  # celery has no types
    """Replaces the step that listens on Celery's own queue: Celery's requires mingle, which waits for other workers."""

    name = "Tasks"
    requires = (Connection,)


class ControlStep(Control):  # type: ignore[misc]  # celery has no types
    """Replaces the step of the remote control in Celery's consumer."""

    name = "Control"
    requires = (TasksStep,)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.box = ControlBox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown

    def include_if(self, consumer: Any) -> bool:
        """Return True: the operator needs `ping` and `stats` also if revokes are switched off."""
        return True


def _is_reply_allowed(body: dict[str, Any]) -> bool:
    reply_to = body.get("reply_to")
    if reply_to is None:
        return True
    key = reply_to.get("routing_key") if isinstance(reply_to, dict) else None
    return (
        isinstance(reply_to, dict)
        and reply_to.get("exchange") == REPLY_EXCHANGE
        and isinstance(key, str)
        and _REPLY_KEY.fullmatch(key) is not None
    )


def _ping(_state: Any, **_: Any) -> dict[str, str]:
    return {"ok": "pong"}
