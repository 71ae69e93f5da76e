"""Writes what the loaders report into jobs, and logs the failures that an operator should know of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from shiwu.contract import ErrorInfo, ImageInfo, log_level_of, without_query
from shiwu_worker.loaders.protocol import Loaded, LoadFailed

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.loaders.protocol import LoadResult

log: FilteringBoundLogger = structlog.get_logger()


def record(result: LoadResult, job: Job) -> None:
    """Write times, image facts and the error of a result into its job."""
    moments = job.moments
    moments.fetch_from_s = result.started_s
    moments.decode_from_s, moments.batch_from_s = result.fetched_s, result.decoded_s
    reference = without_query(job.request.image) if job.request is not None else None
    if isinstance(result, LoadFailed):
        if reference is not None:
            job.image = ImageInfo(reference=reference, bytes=result.n_bytes)
        job.fail(result.error)
        _log_failure(job, result.error, result.detail)
        return
    sha256 = job.sha256 = result.sha256
    if isinstance(result, Loaded):
        job.has_pixels, job.is_not_modified = True, False
        if reference is not None:
            job.image = ImageInfo(reference, result.format, result.width, result.height, result.n_bytes, sha256)
    else:
        job.is_not_modified = result.n_bytes is None
        if reference is not None:
            job.image = ImageInfo(reference=reference, bytes=result.n_bytes, sha256=sha256)


def _log_failure(job: Job, error: ErrorInfo, detail: str | None) -> None:
    level = log_level_of(error.code)
    if detail is not None or level != "info":
        getattr(log, level)("source_failed", id=job.log_id, code=str(error.code), detail=detail or error.message)
