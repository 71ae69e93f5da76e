"""A drill with attackers among the users: their jobs are refused, and other jobs are not affected."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Final

from tests.support import bombs
from tests.support.family import cpu_s, family

from drill.drill_run import DrillRun, Outcome, stream_entries, wrong
from drill.inputs import mark, poison_env, wrong_statuses
from shiwu.contract import DEAD, Answer

SHARE: Final = 0.05
MIN_RATE_RATIO: Final = 0.90
"""Promised: good images a second among hostile ones ÷ those without."""
MIN_JOBS: Final = 5000
"""Fewer jobs give no meaningful rate, which is then reported and not checked."""
ALLOWED: Final = {*bombs.HARMLESS}
"""Bombs within every limit: they are tagged, and cost as much as any image of their size."""
INTERNAL: Final = (
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1:6379/",
    "http://[::1]/",
    "http://10.0.0.1/a.jpg",
    "http://0x7f.1/a.jpg",
    "file:///etc/passwd",
)


@dataclass
class _Hostile:
    """What attackers send."""

    refused: list[str] = field(default_factory=list)
    crashers: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    aborts: set[str] = field(default_factory=set)
    """Ids of jobs that crash their decoder."""


def hostile(run: DrillRun) -> Outcome:
    """One job in twenty is a bomb, broken file, internal address or decoder crash; others are hardly slower."""
    worker = run.start_worker(env=poison_env(), load_timeout_s=10, decode_cpu_s=5, slots=256)
    for image in run.images:
        run.enqueue(5, [image])
    run.wait_answers(len(run.sent))
    truth = _labels(run, run.sent)
    before_s = cpu_s(family(worker.pid))
    without = _rate(run, run.jobs, None)
    between_s = cpu_s(family(worker.pid))
    bad = _prepared(run)
    with_hostile = _rate(run, run.jobs, bad)
    after_s = cpu_s(family(worker.pid))
    ratio = with_hostile / without
    run.breaks = len(bad.ids)
    notes = (
        f"{len(bad.ids)} hostile; {with_hostile:.0f} good images a second among them, {without:.0f} without: "
        f"{ratio:.0%}; CPU of a good image {(after_s - between_s) / (run.jobs - len(bad.ids)) * 1000:.1f} ms, "
        f"{(between_s - before_s) / run.jobs * 1000:.1f} ms without"
    )
    outcome = run.finish("hostile", promised_s=0, timeout_s=600, notes=notes, only=())
    outcome = wrong(outcome, *wrong_statuses(outcome, bad.ids), *_mistagged(run, truth, bad.ids))
    crashed = {job_id for job_id in bad.aborts if outcome.untagged.get(job_id, "").startswith("decoder_crashed")}
    dead_letters = {job_id for job_id in bad.aborts if run.client.zscore(DEAD, job_id) is not None}
    if crashed != bad.aborts or dead_letters != bad.aborts:
        outcome = wrong(
            outcome,
            f"{len(bad.aborts)} crashed their decoder: {len(crashed)} answers say so, {len(dead_letters)} dead letters",
        )
    if run.jobs >= MIN_JOBS and ratio < MIN_RATE_RATIO:
        outcome = wrong(outcome, notes)
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _prepared(run: DrillRun) -> _Hostile:
    """Write files of every kind into the drill's folder, and add addresses that workers must not reach."""
    made = _Hostile(refused=list(INTERNAL))
    files = {name: make() for name, make in bombs.BOMBS.items() if name not in ALLOWED}
    files |= {name: data for name, data in bombs.truncations().items() if "cut-0.5" in name or "cut-0.05" in name}
    for name, data in files.items():
        path = run.folder / f"hostile-{name}"
        path.write_bytes(data)
        made.refused.append(path.as_uri())
    made.crashers = [mark(run, "ABORT"), mark(run, "MEMORY")]
    return made


def _rate(run: DrillRun, count: int, bad: _Hostile | None) -> float:
    """Enqueue so many jobs, some of them hostile; return the answers to good ones a second."""
    begin, hostile_count, began_s = len(run.sent), 0, time.monotonic()
    turns = itertools.cycle(range(20))
    for start in range(0, count, 200):
        portion = min(200, count - start)
        few = max(1, int(portion * SHARE)) if bad else 0
        run.enqueue(portion - few)
        if bad is None:
            continue
        for _ in range(few):
            # One in twenty of them crashes its decoder: one job in four hundred.
            sources = bad.crashers if next(turns) == 0 else bad.refused
            image = sources[0] if not bad.ids else run.rng.choice(sources)
            [job_id] = run.enqueue(1, [image])
            bad.ids.add(job_id)
            if image == bad.crashers[0]:
                bad.aborts.add(job_id)
            hostile_count += 1
    run.wait_answers(begin + count, timeout_s=1200)
    return (count - hostile_count) / (time.monotonic() - began_s)


def _answers(run: DrillRun) -> dict[str, Answer]:
    return {fields[b"id"].decode(): Answer.from_json(fields[b"answer"]) for _, fields in stream_entries(run.client)}


def _best(answer: Answer) -> tuple[str, str] | None:
    """The image and its best label; None where it has no tags."""
    return (answer.image.reference, answer.tags[0].label) if answer.image and answer.tags else None


def _labels(run: DrillRun, ids: list[str]) -> set[tuple[str, str]]:
    """Images and their best labels without hostile jobs."""
    answers = _answers(run)
    return {best for job_id in ids if (best := _best(answers[job_id]))}


def _mistagged(run: DrillRun, truth: set[tuple[str, str]], hostile_ids: set[str]) -> list[str]:
    """Complaints about good images whose best label differs from the one without hostile jobs."""
    mistagged = [
        job_id
        for job_id, answer in _answers(run).items()
        if job_id not in hostile_ids and (best := _best(answer)) and best not in truth
    ]
    return [f"{len(mistagged)} good images have another label than before, first {mistagged[:3]}"] if mistagged else []
