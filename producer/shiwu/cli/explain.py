"""The command that says where a job is and why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final

import click
import msgspec
from pydantic_core import to_json

from shiwu.cli.base import Exit, main
from shiwu.cli.terminal import echo_data, echo_json, span_text
from shiwu.client.client import Client
from shiwu.client.job_report import JobReport, JobState
from shiwu.client.results import TagResult
from shiwu.client.usual_times import UsualTime
from shiwu.contract import Attempt, Cache, Timing, without_query

BAR: Final = 24
"""Characters of the bar of a stage that took all the time."""
SHOWN_TAGS: Final = 3
MANY_TIMES: Final = 2.0
"""A stage is named as unusual from this multiple of its usual 95th percentile."""
SHORT_MS: Final = 100.0
"""Nothing below this is named as what a job waited for."""
ADVICE: Final = {
    "queue": "the lane: no worker had room. Add workers, or use the interactive lane for fewer images",
    "earlier": "earlier attempts and their pauses, or its countdown",
    "claim": "the claim thread, or new labels that were encoded first; name a label set of the worker",
    "fetch": "the source of the image; its host or bucket is slow from here",
    "decode": "decoding; the file is large, or the loaders share too few cores",
    "batch": "the device: other batches came first",
    "encode": "the model's forward pass",
    "score": "scoring; many labels were compared",
}
"""Field of `Timing` → what a job waited for that spent most of its time there."""

HEADLINES: Final = {
    JobState.WAITING: "waits in the lane {0.lane}, {0.ahead} messages before it",
    JobState.QUARANTINED: "waits in quarantine, {0.ahead} before it: workers died while they held it, so it runs alone",
    JobState.DELAYED: "is delayed until {due}, in {left}",
    JobState.CLAIMED: "is held by {0.worker}, attempt {0.attempt}",
    JobState.ANSWER_EXPIRED: "was answered; the answer is no longer kept (SHIWU_RESULT_TTL_S), and there is no second",
    JobState.FOREIGN: "belongs to another Celery task on this Redis",
}


@main.command()
@click.argument("job_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def explain(client: Client, /, *, job_id: str, as_json: bool) -> None:
    """Say where a job is and why, or show the times of its answer beside the usual ones.

    Needs a Redis user that may read lanes, claims and answers, as shiwu-admin. Exit code 1: nothing is known of the id.
    """
    report = client.explain(job_id)
    if as_json:
        fields = asdict(report) | {
            "result": None if report.result is None else msgspec.to_builtins(report.result),
            "history": [msgspec.to_builtins(attempt) for attempt in report.history],
        }
        echo_json(to_json(fields))
    else:
        for line in report_lines(report):
            echo_data(line)
    if report.state is JobState.UNKNOWN:
        sys.exit(int(Exit.NOT_TAGGED))


def report_lines(report: JobReport) -> Iterator[str]:
    """The report as lines of text."""
    result = report.result
    yield f"{report.id}  {_headline(report)}"
    if report.image is not None:
        yield f"  image {without_query(report.image)}"
    if report.sent_ms is not None and result is None:
        yield f"  enqueued {_clock(report.sent_ms)}, {span_text(report.now_ms - report.sent_ms)} ago"
    yield from map("  {}".format, _notes(report))
    for attempt in report.history:
        yield f"  before: {_attempt(attempt)}"
    if result is not None and report.state is JobState.ANSWERED:
        yield from map("  {}".format, _receipt(report, result))


def _headline(report: JobReport) -> str:
    if report.state is JobState.ANSWERED and report.result is not None:
        return _answer_line(report.result)
    if report.state is JobState.UNKNOWN:
        return _unknown(report)
    return HEADLINES[report.state].format(report, due=_clock(report.due_ms), left=_until(report.due_ms, report))


def _unknown(report: JobReport) -> str:
    if report.is_searched_whole:
        return "is unknown: never enqueued in this database, or answered so long ago that nothing is left of it"
    return "was not found: no answer, no claim, and not among the next 20,000 messages of each lane"


def _answer_line(result: TagResult) -> str:
    tags = ", ".join(f"{tag.label} {tag.score:.2f}" for tag in (result.tags or ())[:SHOWN_TAGS])
    reason = f"{result.error.code}: {result.error.message}" if result.error is not None else tags
    return f"{result.status} {reason}".rstrip()


def _notes(report: JobReport) -> Iterator[str]:
    """What else is known of the job, a line each."""
    if report.lease_ms is not None and report.state is JobState.CLAIMED:
        left = _until(report.lease_ms, report)
        yield f"lease: returns to its lane in {left} unless the worker renews it"
        if report.lease_ms < report.now_ms:
            yield "the lease has expired: the worker is gone; another worker or `shiwu sweep` returns the job"
    if report.answer_by_ms is not None and report.result is None:
        yield f"has an answer by {_clock(report.answer_by_ms)}, in {_until(report.answer_by_ms, report)}"
    if report.is_revoked and report.result is None:
        yield "Celery's revoke named it: it ends `cancelled` when a worker claims it"
    if report.deaths:
        yield f"{report.deaths} workers died while they held it"
    if report.dead_ms is not None:
        yield f"dead letter since {_clock(report.dead_ms)}: `shiwu dead requeue {report.id}` enqueues it again"
    if report.callbacks_due_ms is not None:
        yield "its callbacks wait to be sent"


def _attempt(attempt: Attempt) -> str:
    parts = [f"attempt {attempt.attempt}", attempt.worker or "an unknown worker", str(attempt.code)]
    if attempt.stage is not None:
        parts.append(f"in {attempt.stage}")
    parts.append(f"ended {_time(attempt.at)}")
    if attempt.pause is not None:
        parts.append(f"then a pause of {span_text(attempt.pause)}")
    return ", ".join(parts)


def _receipt(report: JobReport, result: TagResult) -> Iterator[str]:
    """The times of an answer, each beside the usual one."""
    if result.image is not None:
        size = f", {result.image.width}x{result.image.height} {result.image.format}" if result.image.width else ""
        yield f"image {result.image.reference}{size}"
    where = [f"lane {result.lane}", f"worker {result.worker}", f"attempt {result.attempts}"]
    if result.batch_size is not None:
        where.append(f"batch of {result.batch_size}")
    if result.answered_at is not None:
        where.append(f"answered {_time(result.answered_at)}")
    yield ", ".join(where)
    total = result.timing.total
    for name in _stages(result.timing):
        value = getattr(result.timing, name)
        share = value / total if total else 0.0
        bar = "#" * round(share * BAR)
        yield f"{name:<8}{span_text(value):>10}  {share:>4.0%} {bar:<{BAR}}{_usual_text(report.usual.get(name))}"
    yield f"{'total':<8}{span_text(total):>10}  {'':>4} {'':<{BAR}}{_usual_text(report.usual.get('total'))}"
    yield from _reason(report, result)


def _stages(timing: Timing) -> list[str]:
    """The parts of the total that the answer has, in their order."""
    names = ("earlier", "queue", "claim", "fetch", "decode", "batch", "encode", "score")
    return [name for name in names if getattr(timing, name) is not None]


def _reason(report: JobReport, result: TagResult) -> Iterator[str]:
    """What most of the time was spent on, where that is much or unusual."""
    name = max(_stages(result.timing), key=lambda name: getattr(result.timing, name))
    value, usual = getattr(result.timing, name), report.usual.get(name)
    if value < SHORT_MS:
        return
    if name == "batch" and result.cache == Cache.JOINED:
        yield "it waited for another job with the same image, whose encoding serves both"
        return
    compared = ""
    if usual is not None and value > MANY_TIMES * usual.p95:
        compared = f", {value / max(usual.p95, 0.001):.0f} times the usual p95"
    yield f"it waited for {ADVICE[name]}{compared}"


def _usual_text(usual: UsualTime | None) -> str:
    return "" if usual is None else f"  usual p50 {span_text(usual.p50)}, p95 {span_text(usual.p95)}"


def _until(at_ms: float | None, report: JobReport) -> str:
    return span_text(max(0.0, (at_ms or report.now_ms) - report.now_ms))


def _clock(at_ms: float | None) -> str:
    return _time(datetime.fromtimestamp((at_ms or 0.0) / 1000, UTC))


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
