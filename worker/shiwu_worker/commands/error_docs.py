"""Writes docs/errors.md from the tables in the code: `python -m shiwu_worker.commands.error_docs docs/errors.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from shiwu.broker.redis_errors import REDIS_ERRORS, RedisFault, markers_of
from shiwu.contract import CODES, Fault
from shiwu_worker.stages.fetch.error_table import TABLE, UNKNOWN, Row

_HEAD = """\
# Error codes

<!-- Written by `make docs` from the tables in the code. Do not edit. -->

Every answer without tags has an `error` with a stable `code`. This page lists all codes, and says which replies and
errors of a source lead to which code. The worker reads the same tables.

- [Codes](#codes): meaning, status of the answer, retries, what to do
- [Replies and errors of sources](#replies-and-errors-of-sources): S3, HTTP, files
- [Errors of Redis](#errors-of-redis)

## Codes

A *retried* job goes back to its lane with a growing delay, and is answered when its attempts are used up:
`SHIWU_MAX_ATTEMPTS`, or what `SHIWU_RETRY` says for its code. A job that ends without tags is kept as a dead letter
unless it expired or was cancelled; `shiwu dead requeue --code CODE` sends it again.
"""
_SOURCES = """
## Replies and errors of sources

Every other reply or error is `{unknown}`: {fault}. The job is retried, and the worker's log line `source_failed`
(level `{level}`) has the cause. Lines about other codes have the level of their row.

Statuses 200 and 203, and 206 with the whole body, are successes. Interim replies (1xx) are skipped.

`Retry-After` (seconds or a date) of a retried reply is honoured up to `SHIWU_RETRY_AFTER_LONGEST_S`: there is no quick
retry, the job returns after the pause at the earliest, and until then each loader process sends no request to that
host or bucket. A job that is released for that reason without a request keeps its attempts. obstore does not report
the header.
"""
_REDIS = """
## Errors of Redis

Clients, workers and the command line read this table. What *passes* is waited for: a worker keeps its answers and
claims nothing meanwhile (log event `redis_unavailable`), and `Client.wait` goes on to its deadline. What does not pass
ends a process that has not worked yet with exit code 64 where *at fault* says "the settings". A worker that has worked
keeps what it holds, tries again, and logs `redis_refused` every 30 s. Callbacks that meet an error of one command are
given up.

| code | passes | at fault | about one command | what leads to it | meaning | what to do |
|---|---|---|---|---|---|---|
"""
_REDIS_FAULTS = {
    RedisFault.SERVER: "the server or the network",
    RedisFault.SETTINGS: "the settings",
    RedisFault.DATA: "another writer",
    RedisFault.SERVICE: "the service",
}
_FAULTS = {
    Fault.REQUEST: "the request",
    Fault.IMAGE: "the image",
    Fault.SOURCE: "the source",
    Fault.SERVICE: "the service",
    Fault.CALLER: "none: the caller asked for it",
}


def page() -> str:
    """Return the page as Markdown."""
    unknown = {"unknown": UNKNOWN.error_code, "fault": "the service's own fault", "level": UNKNOWN.log_level}
    parts = [_HEAD, _codes(), _SOURCES.format(**unknown)]
    for kind, rows in TABLE.items():
        parts += [f"\n### {kind.value}\n\n", *_rows(rows)]
    return "".join([*parts, _REDIS, *_redis_rows()])


def _redis_rows() -> Iterator[str]:
    for code, info in REDIS_ERRORS.items():
        signs = ", ".join(markers_of(code))
        is_temporary, is_one_command = ("yes" if flag else "no" for flag in (info.is_temporary, info.is_about_command))
        fault = _REDIS_FAULTS[info.fault]
        yield f"| `{code}` | {is_temporary} | {fault} | {is_one_command} | {signs} | {info.meaning} | {info.remedy} |\n"


def _codes() -> str:
    lines = ["| code | status | at fault | retried | meaning | what to do |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{code}` | {info.status or 'raised by the client'} | {_FAULTS[info.fault]} | {info.retry} | {info.meaning} "
        f"| {info.remedy} |"
        for code, info in CODES.items()
    ]
    return "\n" + "\n".join(lines) + "\n"


def _rows(rows: Iterable[Row]) -> Iterator[str]:
    yield "| what came | what it means | code | retried | at fault | log |\n|---|---|---|---|---|---|\n"
    for row in rows:
        keys = ", ".join(f"`{key}`" for key in sorted(row.keys))
        retried = "no" if row.is_final else "yes"
        yield f"| {keys} | {row.means} | `{row.error_code}` | {retried} | {_FAULTS[row.fault]} | {row.log_level} |\n"


def main() -> None:
    """Write the page to the path of the first argument."""
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
