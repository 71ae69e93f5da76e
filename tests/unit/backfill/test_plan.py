"""Options of a backfill: filters, rates, windows, and the digest of its plan."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

import msgspec
import pytest

from shiwu.backfill.entries import Entry
from shiwu.backfill.plan import (
    Plan,
    output_address,
    read_newer,
    read_rate,
    read_share,
    read_suffixes,
    read_window,
)

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
PLAN = Plan("s3://b/p/", suffixes=read_suffixes(".JPG, .png"), newer="30d", newer_than=NOW)


@pytest.mark.parametrize(
    ("reference", "kept"),
    [
        ("s3://b/a.JPG", True),
        ("s3://b/a.jpg?versionId=3", True),
        ("https://h/a.png?sig=x.gif", True),
        ("s3://b/a.jpg.txt", False),
        ("https://h/a?x=.jpg", False),
        ("file:///a/b.jpg", True),
    ],
)
def test_suffix_is_that_of_the_name(reference: str, kept: bool) -> None:
    """In any case, without version and query."""
    assert PLAN.keeps(Entry("1", reference)) is kept


def test_lines_without_an_image_pass_the_filters() -> None:
    """They are reported as rejected."""
    assert PLAN.keeps(Entry("1", "", error="expected a JSON object"))


@pytest.mark.parametrize(("seconds", "kept"), [(0, True), (-1, False), (None, True)])
def test_newer_objects_are_kept(seconds: float | None, kept: bool) -> None:
    modified = None if seconds is None else NOW + timedelta(seconds=seconds)
    assert PLAN.keeps(Entry("1", "s3://b/a.jpg", modified=modified)) is kept


def test_digest_covers_all_but_the_resolved_moment() -> None:
    """A second start has another moment for the same age."""
    later = msgspec.structs.replace(PLAN, newer_than=NOW + timedelta(days=1))
    assert later.digest == PLAN.digest
    changes = {"source": "s3://b/q/", "column": "url", "suffixes": (), "newer": "", "fields": {"top_k": 3}}
    changes |= {"out": "/out", "format": "parquet"}
    digests = {msgspec.structs.replace(PLAN, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {PLAN.digest}) == len(changes) + 1
    assert set(changes) | {"newer_than"} == {field.name for field in msgspec.structs.fields(Plan)}


def test_newer_is_an_age_or_a_date() -> None:
    assert read_newer("30d", now=NOW) == NOW - timedelta(days=30)
    assert read_newer("1.5h", now=NOW) == NOW - timedelta(minutes=90)
    assert read_newer("2026-11-01", now=NOW) == datetime(2026, 11, 1, tzinfo=UTC)
    assert read_newer("2026-11-01T00:00+08:00", now=NOW) == datetime(2026, 10, 31, 16, tzinfo=UTC)


def test_rate_and_share_have_units() -> None:
    assert [read_rate(text) for text in ("500/s", "500", "30000/m", "3600/h")] == [500, 500, 500, 1]
    assert [read_share(text) for text in ("50%", "0.5", "100%")] == [0.5, 0.5, 1]


@pytest.mark.parametrize(
    "text", ["", "x", "30", "d", "2026-13-01", "nan", "-1", "0", "500/y", "200%", "1e400", "9999999d", "²d"]
)
def test_unreadable_option_is_refused(text: str) -> None:
    for read in (lambda text: read_newer(text, now=NOW), read_share, read_window):
        if (read, text) != (read_share, "1"):
            with pytest.raises(ValueError, match="expected"):
                read(text)
    if text not in {"30"}:
        with pytest.raises(ValueError, match="expected a rate"):
            read_rate(text)


@pytest.mark.parametrize(
    ("text", "moment", "is_open"),
    [
        ("22:00-06:00@Asia/Shanghai", "2026-11-30T14:00Z", True),
        ("22:00-06:00@Asia/Shanghai", "2026-11-30T13:59Z", False),
        ("22:00-06:00@Asia/Shanghai", "2026-11-30T21:59Z", True),
        ("22:00-06:00@Asia/Shanghai", "2026-11-30T22:00Z", False),
        ("09:30-17:00", "2026-11-30T09:29Z", False),
        ("09:30-17:00", "2026-11-30T09:30Z", True),
        ("00:00-00:00", "2026-11-30T12:00Z", True),
        # Clocks in Berlin go from 02:00 to 03:00 on 2026-03-29.
        ("01:00-03:30@Europe/Berlin", "2026-03-29T01:29Z", True),
        ("01:00-03:30@Europe/Berlin", "2026-03-29T01:30Z", False),
    ],
)
def test_window_is_open_by_local_clocks(text: str, moment: str, is_open: bool) -> None:
    assert read_window(text).is_open(datetime.fromisoformat(moment)) is is_open


@pytest.mark.parametrize("text", ["22:00", "22:00-24:00", "22-6", "1:00-2:00@Nowhere/City", "22:00-06:00@../../etc"])
def test_unreadable_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected hours and a time zone"):
        read_window(text)


def test_output_is_kept_as_an_absolute_address() -> None:
    here = PurePosixPath("/home/me")
    assert [output_address(out, here=here) for out in (None, "out", "/x", "s3://b/p", "s3://b/p/")] == [
        "",
        "/home/me/out",
        "/x",
        "s3://b/p/",
        "s3://b/p/",
    ]


def test_differences_are_named_as_they_are_written() -> None:
    """By options, without the notation of Python; the moment that an age meant is no difference."""
    other = msgspec.structs.replace(
        PLAN,
        suffixes=(".jpg",),
        newer="",
        newer_than=None,
        fields={"labels": ["猫", "狗"], "top_k": 3},
        format="parquet",
    )
    assert PLAN.differences(other) == [
        "--suffix .jpg,.png, now .jpg",
        "--newer 30d, now not given",
        "--format jsonl, now parquet",
        "--labels not given, now 猫,狗",
        "--top-k not given, now 3",
    ]
    assert PLAN.differences(msgspec.structs.replace(PLAN, newer_than=None)) == []
