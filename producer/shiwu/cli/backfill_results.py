"""Reads the answers of a backfill from the parts of its results, also while it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.contract import BACKFILL, Answer, ErrorInfo, ImageInfo, Tag, Timing
from shiwu.gallery.answer_lines import read_answers
from shiwu.parts import Objects, SourceError

TIMEOUT_S: Final = 5.0
GROUP_ROWS: Final = 1000
_PART: Final = b"part:"


class NoResults(ValueError):
    """There is no such backfill, or it has no results that can be read; the text says why."""


class _Plan(msgspec.Struct, frozen=True):
    """What is read of a plan, which has more fields."""

    out: str = ""
    format: str = "jsonl"


class _Part(msgspec.Struct, frozen=True):
    """What is read of a part."""

    name: str
    temp: str = ""


def read_backfill(url: str, name: str) -> Iterator[Answer]:
    """Yield the answers of all complete parts, in their order; the next part is read when it is needed.

    Raises:
        NoResults: there are none.
        SourceError: the bucket cannot be read.
        ModuleNotFoundError: a library of the extra `backfill` is missing.
        redis.RedisError: Redis is unavailable.
    """
    plan, parts = _read_state(url, name)
    if not plan.out:
        raise NoResults(f"expected a backfill with --out, {name} only counts its answers")
    if not parts:
        raise NoResults(f"expected a backfill with a complete part, {name} has none yet")
    for part in parts:
        yield from _read_part(plan, part)


def _read_state(url: str, name: str) -> tuple[_Plan, list[_Part]]:
    shards = open_shards(url, PoolOptions(timeout_s=TIMEOUT_S, retries=3))
    try:
        # The states of all backfills are in the first shard.
        fields: Any = shards[0].hgetall(f"{BACKFILL}{name}")
    finally:
        for shard in shards:
            shard.close()
    if not fields:
        raise NoResults(f"expected the name of a backfill, got {name!r:.80}; shiwu backfill list shows them")
    try:
        plan = msgspec.json.decode(fields[b"plan"], type=_Plan)
        numbered = {
            int(field.removeprefix(_PART)): msgspec.json.decode(text, type=_Part)
            for field, text in fields.items()
            if field.startswith(_PART)
        }
    except (ValueError, KeyError) as error:
        raise NoResults(f"{name}: expected the state of a backfill ({error})") from None
    return plan, [part for _, part in sorted(numbered.items())]


def _read_part(plan: _Plan, part: _Part) -> Iterator[Answer]:
    read = _read_parquet if plan.format == "parquet" else _read_lines
    if not plan.out.startswith("s3://"):
        # A process that crashed may not have given the part its name yet.
        paths = [Path(plan.out, name) for name in (part.name, part.temp) if name]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise NoResults(f"expected {paths[0]} on this machine, where the backfill has written it")
        yield from read(path)
        return
    with tempfile.TemporaryDirectory(prefix="shiwu-gallery-") as folder:
        path = Path(folder, part.name)
        try:
            Objects().download(f"{plan.out}{part.name}", path)
        except SourceError:
            if not part.temp:
                raise
            Objects().download(f"{plan.out}{part.temp}", path)
        yield from read(path)


def _read_lines(path: Path) -> Iterator[Answer]:
    with path.open("rb") as file:
        try:
            yield from read_answers(file)
        except ValueError as error:
            raise NoResults(f"{path}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Answer]:
    import pyarrow.parquet as pq  # noqa: PLC0415 an extra

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP_ROWS):
            yield from map(_answer_of, batch.to_pylist())


def _answer_of(row: dict[str, Any]) -> Answer:
    """The answer of a row, without label set and model, of which a row has the names only."""
    error = row["error_code"]
    tags = row["tags"]
    return Answer(
        id=row["id"],
        status=row["status"],
        image=ImageInfo(
            reference=row["reference"],
            **{name: row[name] for name in ("format", "width", "height", "bytes", "sha256")},
        )
        if row["reference"]
        else None,
        tags=None if tags is None else tuple(Tag(**tag) for tag in tags),
        error=ErrorInfo(code=error, message=row["error_message"] or "", stage=row["error_stage"]) if error else None,
        timing=Timing(total=row["total_ms"] or 0.0),
        attempts=row["attempts"],
        worker=row["worker"] or "",
        answered_at=row["answered_at"],
        metadata=None if row["metadata"] is None else msgspec.json.decode(row["metadata"]),
    )
