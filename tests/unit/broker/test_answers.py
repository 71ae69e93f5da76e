"""What the commit script is told about an answer, in one short text."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import Answer, Attempt, Stage, Status

ATTEMPT = Attempt(attempt=1, at=datetime(2026, 1, 1, tzinfo=UTC), code="source_unavailable", stage=Stage.FETCH)
DIGEST = "~" + "0a" * 20


def kind(status: Status = Status.TAGGED, *, job_id: str = "a", history: Any = None, **fields: Any) -> str:
    """The kind of an entry."""
    return AnswerEntry(id=job_id, answer=Answer(id=job_id, status=status, history=history), **fields).kind


def test_each_status_has_its_letter() -> None:
    """Celery knows three states: what was revoked has its own, and what was not tagged has failed."""
    assert kind(Status.TAGGED) != kind(Status.FAILED)
    assert kind(Status.FAILED) == kind(Status.REJECTED) == "F"
    assert kind(Status.CANCELLED) == kind(Status.EXPIRED) not in {kind(Status.TAGGED), "F"}


@pytest.mark.parametrize(
    ("fields", "letter"),
    [
        ({"ignore_result": True}, "I"),
        ({"is_dead": True}, "D"),
        ({"has_callbacks": True}, "C"),
        ({"history": (ATTEMPT,)}, "H"),
        ({"job_id": DIGEST}, "N"),
        ({"is_from_outside": True}, "A"),
        ({"generation": 12}, "12"),
    ],
)
def test_each_flag_has_its_letter(fields: dict[str, Any], letter: str) -> None:
    """And nothing else changes."""
    assert kind(**fields) == kind() + letter


def test_flags_stand_together() -> None:
    """The generation counts only for a writer that holds the job."""
    plain = kind()
    flags = {"ignore_result": True, "is_dead": True, "has_callbacks": True, "history": (ATTEMPT,)}
    assert kind(**flags, generation=3) == plain + "IDCH3"
    assert kind(**flags, generation=3, is_from_outside=True) == plain + "IDCHA"
    assert kind(job_id=DIGEST, claim=DIGEST) == plain, "the claim names the digest"
    assert kind(job_id="~no digest") == plain
