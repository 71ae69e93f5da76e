"""Jobs of entries: ids that stay the same, requests, and records of what cannot be a job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shiwu.backfill.entries import Entry, JobMaker, KeptRecord
from shiwu.contract import RequestError, check_id

ENTRY = Entry("1", "s3://b/猫 +%20.jpg", version="etag", metadata={"b": 1, "a": [None, "x"]})


def id_of(entry: Entry, name: str = "photos", **fields: Any) -> str:
    """The id of the job of this entry."""
    return JobMaker(name, fields).make(entry).id


def test_id_is_the_same_in_each_run() -> None:
    """The value is written down: ids of a newer version must absorb those of this one."""
    assert id_of(ENTRY) == "bf.photos.ae74760e01804d9f2b2332f3"
    assert check_id(id_of(ENTRY)) == id_of(replace(ENTRY, cursor="2", size=3, metadata={"a": [None, "x"], "b": 1}))


@pytest.mark.parametrize(
    "other",
    [
        replace(ENTRY, reference="s3://b/c.jpg"),
        replace(ENTRY, version="other"),
        replace(ENTRY, metadata=None),
        replace(ENTRY, reference=ENTRY.reference + "\0etag", version=""),
    ],
    ids=["reference", "version", "metadata", "border"],
)
def test_id_differs_for_another_entry(other: Entry) -> None:
    assert id_of(other) != id_of(ENTRY)


def test_id_differs_for_another_request_or_name() -> None:
    assert len({id_of(ENTRY), id_of(ENTRY, labels="six-zh"), id_of(ENTRY, top_k=3), id_of(ENTRY, "other")}) == 4


def test_request_has_shared_fields_and_metadata() -> None:
    maker = JobMaker("photos", {"labels": ["猫", "狗"], "top_k": 3})
    job = maker.make(ENTRY)
    assert job.request is not None
    assert job.request.model_dump(exclude_defaults=True, mode="json") == {
        "image": ENTRY.reference,
        "labels": ["猫", "狗"],
        "top_k": 3,
        "metadata": ENTRY.metadata,
    }
    assert maker.again(job.id, job.record) == job


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (Entry("1", "s3://b/new\nline.jpg"), "invalid_reference"),
        (Entry("1", "ftp://b/x.jpg"), "invalid_reference"),
        (Entry("1", "s3://b/x.jpg", metadata="x" * 5000), "metadata_too_large"),
        (Entry("1", "", version="7b", error="expected a JSON object"), "invalid_request"),
    ],
    ids=["newline", "scheme", "metadata", "line"],
)
def test_entry_that_cannot_be_a_job_has_the_reason(entry: Entry, code: str) -> None:
    job = JobMaker("photos", {}).make(entry)
    assert job.request is None
    assert (job.record.code, job.record.image) == (code, entry.reference)
    assert "expected" in job.record.error
    assert KeptRecord.from_bytes(KeptRecord(12, job.record).to_bytes()) == KeptRecord(12, job.record)


def test_invalid_shared_field_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="top_k"):
        JobMaker("photos", {"top_k": 0})
