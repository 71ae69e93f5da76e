"""Errors of a backfill, each with a stable code."""

from __future__ import annotations

from shiwu.errors import ShiwuError


class BackfillError(ShiwuError):
    """A backfill cannot go on; the text says what was expected, what came and what to do."""

    code = "backfill_error"


class TakenOver(BackfillError):
    """Another process runs this backfill now."""

    code = "backfill_taken_over"


class StateLost(BackfillError):
    """Redis has lost writes that it had acknowledged, as in a failover. The run begins again with what is left."""

    code = "backfill_state_lost"


class UnusableState(BackfillError):
    """Redis has lost what a run needs to go on, or this version cannot read it."""

    code = "backfill_state"


class WrongState(BackfillError):
    """The backfill is not in a state in which this is possible; a command ends with the code of wrong usage."""

    code = "backfill_state"
