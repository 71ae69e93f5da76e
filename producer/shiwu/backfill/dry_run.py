"""Reads a source and tells what a backfill would send. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Final

from shiwu.backfill.entries import Job, JobMaker, shown_reference
from shiwu.backfill.open_jobs import MAX_PORTION
from shiwu.backfill.plan import Plan
from shiwu.backfill.sources.base import Source
from shiwu.contract import without_query

EXAMPLES: Final = 3


def dry_run(
    plan: Plan, source: Source, maker: JobMaker, *, answered_before: Callable[[list[str]], list[str]] | None
) -> dict[str, Any]:
    """Count the entries of a source by what would happen to them, with examples.

    Args:
        answered_before: those of the ids that have an answer; None to ask for none.
    """
    counts: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    examples: list[str] = []
    refused: list[str] = []
    size = 0
    jobs = _jobs(plan, source, maker, counts)
    while portion := list(islice(jobs, MAX_PORTION)):
        skipped = set(answered_before([job.id for job, _ in portion]) if answered_before else ())
        for job, bytes_ in portion:
            if job.request is None:
                counts["refused"] += 1
                if len(refused) < EXAMPLES:
                    refused.append(
                        f"{shown_reference(job.record.image)}: {job.record.error}"
                        if job.record.image
                        else job.record.error
                    )
            elif job.id in skipped:
                counts["answered_before"] += 1
            else:
                counts["to_send"] += 1
                size += bytes_
                suffixes[PurePosixPath(without_query(job.record.image)).suffix.lower() or "(none)"] += 1
                if len(examples) < EXAMPLES:
                    examples.append(without_query(job.record.image))
    return {
        "read": counts["read"],
        "left_out": counts["left_out"],
        "refused": counts["refused"],
        "answered_before": counts["answered_before"],
        "to_send": counts["to_send"],
        "bytes": size or None,
        "suffixes": dict(suffixes.most_common(10)),
        "examples": examples,
        "refused_examples": refused,
    }


def _jobs(plan: Plan, source: Source, maker: JobMaker, counts: Counter[str]) -> Iterator[tuple[Job, int]]:
    """Yield the jobs that pass the filters, with the sizes of their objects where the source has them."""
    for entry in source.entries(""):
        counts["read"] += 1
        if plan.keeps(entry):
            yield maker.make(entry), entry.size or 0
        else:
            counts["left_out"] += 1
