"""Fields of a message that the worker does not know are named in the answer's warnings, and the job is done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shiwu.contract import ErrorCode, Lane, WarningCode
from shiwu_worker.jobs.job import Claimed, Job, open_job


def opened(*args: Any, **kwargs: Any) -> Job:
    """The job of a message as a Celery client writes it."""
    headers = {"task": "shiwu.tag", "id": "j1"}
    body = json.dumps([list(args), kwargs, {}])
    raw = json.dumps({"headers": headers, "body": body, "content-type": "application/json"}).encode()
    return open_job(Claimed(id="j1", attempt=1, key=Lane.BULK.queue, raw=raw, claimed_ms=0.0, claimed_s=0.0))


def test_known_fields_give_no_warning() -> None:
    """By name and by position."""
    job = opened("s3://b/k", "six-zh", 3, threshold=0.5, min_cosine=0.1, metadata={"label": 1}, callback="orders")
    assert job.warnings == ()
    assert job.answer(worker="w", until_s=0.0).callback == "orders"


@pytest.mark.parametrize(
    ("name", "meant"), [("label", "labels"), ("topK", "top_k"), ("Threshold", "threshold"), ("min_cos", "min_cosine")]
)
def test_unknown_field_gives_warning_with_suggestion(name: str, meant: str) -> None:
    """The job goes on without that field."""
    job = opened("s3://b/k", **{name: 1})
    assert job.error is None
    (warning,) = job.warnings
    assert warning.code is WarningCode.UNKNOWN_FIELD
    assert f"{name!r} (did you mean {meant!r}?)" in warning.message
    answer = job.answer(worker="w", until_s=0.0)
    assert answer.warnings == job.warnings


def test_refused_message_names_its_unknown_fields() -> None:
    """A misspelled field is often the reason why another one is missing."""
    job = opened(url="s3://b/k")
    assert job.error is not None
    assert job.error.code is ErrorCode.INVALID_REFERENCE
    assert "'url'" in job.warnings[0].message


def test_many_unknown_fields_give_a_short_warning() -> None:
    """A producer chooses the names, and the answer quotes them."""
    names = {f"{number}\n\u202e{'x' * 1000}": 1 for number in range(100)}
    (warning,) = opened("s3://b/k", **names).warnings
    assert len(warning.message) < 400
    assert warning.message.isprintable()
