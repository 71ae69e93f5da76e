"""How some schedules begin: steps that lead to states which chance alone reaches in one schedule of thousands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

Opening = Sequence[tuple[str, tuple[Any, ...]]]
_DEATH: Final[Opening] = (("claim", (0, 1, "")), ("crash", (0,)), ("advance", (61_000,)), ("maintain", (1, "")))

OPENINGS: Final[Sequence[Opening]] = (
    # A job in quarantine, while another worker holds a job or believes so.
    (
        *(("enqueue", ("a", "plain", "bulk")), *_DEATH, *_DEATH),
        *(("enqueue", ("b", "plain", "bulk")), ("claim", (1, 1, "")), ("enqueue", ("c", "plain", "bulk"))),
    ),
    (
        *(("enqueue", ("b", "plain", "bulk")), ("claim", (1, 1, ""))),
        *(("enqueue", ("a", "plain", "bulk")), *_DEATH, *_DEATH),
    ),
    # A dead letter that outlives its mark, and a new job with its id.
    (
        *(("enqueue", ("a", "plain", "bulk")), ("claim", (0, 1, "")), ("commit", (0, "failed", 1, ""))),
        *(("advance", (4_000_000,)), ("enqueue", ("a", "plain", "bulk")), ("claim", (1, 1, ""))),
    ),
    # Messages with callbacks that are out of time, in a lane that no worker serves.
    (
        *(("enqueue", ("a", "callbacks_expires", "bulk")), ("enqueue", ("b", "callbacks_expires", "interactive"))),
        ("advance", (61_000,)),
    ),
    # A sweep whose process ended when it had taken such a message.
    (("enqueue", ("a", "expires", "bulk")), ("advance", (61_000,)), ("sweep", ("commit", "unsent"))),
    # A worker with callbacks of several answers.
    (
        *(("enqueue", ("a", "callbacks", "bulk")), ("enqueue", ("b", "callbacks", "bulk"))),
        *(("claim", (0, 5, "")), ("commit", (0, "tagged", 5, ""))),
    ),
    # Delayed jobs.
    (
        *(("enqueue", ("a", "callbacks", "bulk")), ("enqueue", ("b", "plain", "bulk"))),
        *(("claim", (0, 5, "")), ("release", (0, "retried", ""))),
    ),
)
