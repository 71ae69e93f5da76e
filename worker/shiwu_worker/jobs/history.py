"""Earlier tries of a job, as the scripts `release` and `maintain` record them for the worker that claims it next."""

from __future__ import annotations

from shiwu.contract import Attempt, moment


def read_history(record: bytes) -> tuple[Attempt, ...]:
    """The tries of a record with a line for each, the oldest first; lines of another form are left out."""
    return tuple(one for line in record.decode(errors="replace").split("\n") if (one := _read_line(line)) is not None)


def back_in_lane_ms(history: tuple[Attempt, ...]) -> float:
    """When the job was in its lane again after the last of these tries, in ms of Redis' clock; 0 without any."""
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
