"""Reads the earlier attempts of a job, which the scripts `release` and `maintain` record in `shiwu:histories`."""

from __future__ import annotations

from shiwu.contract import Attempt, moment


def read_history(record: bytes) -> tuple[Attempt, ...]:
    """The attempts of a record, the oldest first. Each line is one attempt; lines of another form are skipped."""
    attempts = map(_read_line, record.decode(errors="replace").split("\n"))
    return tuple(attempt for attempt in attempts if attempt is not None)


def back_in_lane_ms(history: tuple[Attempt, ...]) -> float:
    """When the job returned to its lane after its last attempt, in ms of Redis' clock; 0 without an earlier attempt."""
    if not history:
        return 0.0
    return history[-1].at.timestamp() * 1000 + (history[-1].pause or 0.0)


def _read_line(line: str) -> Attempt | None:
    parts = line.split("|", 5)
    if len(parts) != 6:
        return None
    attempt, code, stage, at_ms, pause_ms, token = parts
    try:
        return Attempt(
            attempt=int(attempt),
            code=code,
            at=moment(float(at_ms)),
            stage=stage or None,
            # A token is the name of the worker and a random suffix.
            worker=token.rpartition(".")[0],
            pause=float(pause_ms) or None,
        )
    except (ValueError, OverflowError, OSError):
        return None
