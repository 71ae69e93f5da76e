"""What a backfill does (its plan, which never changes) and how it goes about it (its pace, which may)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import PurePath
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from shiwu.backfill.entries import Entry
from shiwu.cli.params import SPAN_UNITS_S, span_s
from shiwu.contract import Lane, split_s3

OutputFormat = Literal["jsonl", "parquet"]
DEFAULT_MAX_WAITING: Final = 20_000


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which images, which request, which output. A name stands for one plan; its digest covers all but `newer_than`."""

    source: str
    column: str = "image"
    suffixes: tuple[str, ...] = ()
    newer: str = ""
    """As it was written: an age such as 30d, or a moment."""
    newer_than: datetime | None = None
    """The moment that `newer` meant when the backfill was started first."""
    fields: dict[str, Any] = {}
    """Of the request for all images."""
    out: str = ""
    """A folder as an absolute path, or s3://bucket/prefix/; empty for no results."""
    format: OutputFormat = "jsonl"

    def differences(self, other: Plan) -> list[str]:
        """What another plan has otherwise, as `--option VALUE, now VALUE`."""
        mine, theirs = self._as_options(), other._as_options()
        return [
            f"{option} {_shown(mine.get(option))}, now {_shown(theirs.get(option))}"
            for option in dict.fromkeys([*mine, *theirs])
            if mine.get(option) != theirs.get(option)
        ]

    def _as_options(self) -> dict[str, Any]:
        """The plan as it was written on the command line; `newer_than` follows from `newer`."""
        given = {
            "source": self.source,
            "--column": self.column,
            "--suffix": self.suffixes,
            "--newer": self.newer,
            "--out": self.out,
            "--format": self.format,
        }
        return given | {f"--{name.replace('_', '-')}": value for name, value in self.fields.items()}

    @property
    def digest(self) -> str:
        """Differs where a start with the same name would do something else."""
        same = msgspec.structs.replace(self, newer_than=None)
        return hashlib.sha256(msgspec.json.encode(same, order="sorted")).hexdigest()[:16]

    def keeps(self, entry: Entry) -> bool:
        """Whether an entry passes the filters; lines that name no image do, because they are reported."""
        if entry.error:
            return True
        if self.suffixes and not _name_of(entry.reference).lower().endswith(self.suffixes):
            return False
        return self.newer_than is None or entry.modified is None or entry.modified >= self.newer_than


class Pace(msgspec.Struct, frozen=True):
    """How a backfill sends; may differ from one start to the next."""

    lane: str = Lane.BULK.value
    max_waiting: int = DEFAULT_MAX_WAITING
    """How many of its own jobs may be without an answer."""
    rate: float | None = None
    """Jobs a second at most."""
    window: str = ""
    """When it may send; see `Window`."""
    stop_at_failures: float | None = None
    """Share of failures at which it stops sending, 0 to 1."""
    is_missing_only: bool = False
    """Skip what has an answer in Redis."""
    part_rows: int = 50_000
    """Rows of one part of the results."""


def _name_of(reference: str) -> str:
    """What the suffix of a reference is looked for in: an S3 key without version, a URL without query."""
    if reference.startswith("s3://"):
        try:
            return split_s3(reference).key
        except ValueError:
            return reference
    return reference if reference.startswith("file:") else reference.partition("?")[0].partition("#")[0]


def _shown(value: Any) -> str:
    if value is None or value in ("", ()):
        return "not given"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text[:200]


def read_suffixes(text: str) -> tuple[str, ...]:
    """Suffixes separated by commas, in lower case and in order."""
    return tuple(sorted({part.strip().lower() for part in text.split(",") if part.strip()}))


def read_newer(text: str, *, now: datetime, zone: tzinfo = UTC) -> datetime:
    """The moment of an age (30d, 12h, 90m, 2w) or of a date in ISO 8601, by default in UTC.

    Raises:
        ValueError: it is neither.
    """
    try:
        if (age_s := span_s(text)) is not None:
            return now - timedelta(seconds=age_s)
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"expected an age such as 30d or 12h, or a date such as 2026-11-01, got {text!r:.80}"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=zone)


def read_rate(text: str) -> float:
    """Jobs a second, from 500/s, 500, 30000/m or 1000000/h.

    Raises:
        ValueError: it is something else.
    """
    number, _, unit = text.partition("/")
    try:
        rate = float(number) / SPAN_UNITS_S[unit or "s"]
    except (ValueError, KeyError):
        rate = 0.0
    if not 0 < rate < 1e9:
        raise ValueError(f"expected a rate such as 500/s, 30000/m or 1000000/h, got {text!r:.80}")
    return rate


def read_share(text: str) -> float:
    """A share as 50% or 0.5.

    Raises:
        ValueError: it is none, or not above 0 and at most 1.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"expected a share such as 50% or 0.5, got {text!r:.80}")
    return share


@dataclass(frozen=True, slots=True)
class Window:
    """The hours of a day in which a backfill sends, by the clocks of a time zone."""

    begin_minute: int
    end_minute: int
    zone: tzinfo

    def is_open(self, moment: datetime) -> bool:
        """Whether this moment is inside; the end is outside, and equal hours are the whole day."""
        local = moment.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.begin_minute < self.end_minute:
            return self.begin_minute <= minute < self.end_minute
        return minute >= self.begin_minute or minute < self.end_minute

    @property
    def opens(self) -> str:
        """When it opens, for people."""
        return f"{self.begin_minute // 60:02}:{self.begin_minute % 60:02} {self.zone}"


def read_window(text: str) -> Window:
    """Hours such as 22:00-06:00@Asia/Shanghai; without a zone they are UTC.

    Raises:
        ValueError: it is something else.
    """
    hours, _, zone = text.partition("@")
    begin, _, end = hours.partition("-")
    try:
        return Window(_minute(begin), _minute(end), ZoneInfo(zone or "UTC"))
    except (ValueError, OSError, ZoneInfoNotFoundError):
        text = f"expected hours and a time zone such as 22:00-06:00@Asia/Shanghai, got {text!r:.80}"
        raise ValueError(text) from None


def _minute(text: str) -> int:
    hour, minute = map(int, text.strip().split(":"))
    if not (0 <= hour < 24 and 0 <= minute < 60):
        raise ValueError(text)
    return hour * 60 + minute


def output_address(out: str | None, *, here: PurePath) -> str:
    """The address of the output as it is kept: an absolute path, or s3://bucket/prefix/."""
    if not out:
        return ""
    return f"{out.rstrip('/')}/" if out.startswith("s3://") else str(here / out)
