"""A drill with attackers among the users: what they send costs them their answer, and nobody else anything."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Final

from tests.support import bombs
from tests.support.family import cpu_s, family

from drill.field import Field, Outcome, wrong
from drill.inputs import mark, misjudged, poison_env
from shiwu.contract import DEAD, Answer

SHARE: Final = 0.05
LEAST: Final = 0.90
"""Promised: good pictures a second among hostile ones, of those without."""
ENOUGH: Final = 5000
"""Jobs from which a rate means something; a shorter drill only tells it."""
ALLOWED: Final = {*bombs.HARMLESS}
"""Bombs within every limit: they are tagged like any other picture and cost what a picture of their size costs."""
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
    guilty: set[str] = field(default_factory=set)
    aborts: set[str] = field(default_factory=set)
    """Of these, the ones that end their decoder's process."""


def hostile(field: Field) -> Outcome:
    """Five in a hundred are bombs, broken files, internal addresses or kill their decoder; the others notice little."""
    worker = field.worker(env=poison_env(), load_timeout_s=10, decode_cpu_s=5, slots=256)
    for image in field.images:
        field.enqueue(5, [image])
    field.wait_answers(len(field.sent))
    truth = _labels(field, field.sent)
    before_s = cpu_s(family(worker.pid))
    without = _rate(field, field.jobs, None)
    between_s = cpu_s(family(worker.pid))
    bad = _prepared(field)
    with_hostile = _rate(field, field.jobs, bad)
    after_s = cpu_s(family(worker.pid))
    ratio = with_hostile / without
    field.breaks = len(bad.guilty)
    notes = (
        f"{len(bad.guilty)} hostile; {with_hostile:.0f} good pictures a second among them, {without:.0f} without: "
        f"{ratio:.0%}; CPU of a good picture {(after_s - between_s) / (field.jobs - len(bad.guilty)) * 1000:.1f} ms, "
        f"{(between_s - before_s) / field.jobs * 1000:.1f} ms without"
    )
    outcome = field.finish("hostile", promised_s=0, timeout_s=600, notes=notes, only=())
    outcome = wrong(outcome, *misjudged(outcome, bad.guilty), *_mistagged(field, truth, bad.guilty))
    crashed = {one for one in bad.aborts if outcome.untagged.get(one, "").startswith("decoder_crashed")}
    buried = {one for one in bad.aborts if field.client.zscore(DEAD, one) is not None}
    if crashed != bad.aborts or buried != bad.aborts:
        outcome = wrong(outcome, f"{len(bad.aborts)} ended their decoder: {len(crashed)} told so, {len(buried)} buried")
    if field.jobs >= ENOUGH and ratio < LEAST:
        outcome = wrong(outcome, notes)
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _prepared(field: Field) -> _Hostile:
    """Files of every kind in the drill's folder, and addresses that nobody may reach."""
    made = _Hostile(refused=list(INTERNAL))
    files = {name: make() for name, make in bombs.BOMBS.items() if name not in ALLOWED}
    files |= {name: data for name, data in bombs.truncations().items() if "cut-0.5" in name or "cut-0.05" in name}
    for name, data in files.items():
        path = field.folder / f"hostile-{name}"
        path.write_bytes(data)
        made.refused.append(path.as_uri())
    made.crashers = [mark(field, "ABORT"), mark(field, "MEMORY")]
    return made


def _rate(field: Field, count: int, bad: _Hostile | None) -> float:
    """Enqueue so many, some of them hostile, and return the good ones that were answered a second."""
    begin, guilty, began_s = len(field.sent), 0, time.monotonic()
    turns = itertools.cycle(range(20))
    for start in range(0, count, 200):
        portion = min(200, count - start)
        few = max(1, int(portion * SHARE)) if bad else 0
        field.enqueue(portion - few)
        if bad is None:
            continue
        for _ in range(few):
            # One in twenty of them kills its decoder: one job in four hundred.
            sources = bad.crashers if next(turns) == 0 else bad.refused
            image = sources[0] if not bad.guilty else field.chance.choice(sources)
            [job_id] = field.enqueue(1, [image])
            bad.guilty.add(job_id)
            if image == bad.crashers[0]:
                bad.aborts.add(job_id)
            guilty += 1
    field.wait_answers(begin + count, timeout_s=1200)
    return (count - guilty) / (time.monotonic() - began_s)


def _answers(field: Field) -> dict[str, Answer]:
    found, last = {}, "-"
    while portion := field._entries(last):
        for _, fields in portion:
            found[fields[b"id"].decode()] = Answer.from_json(fields[b"answer"])
        last = f"({portion[-1][0].decode()}"
    return found


def _best(answer: Answer) -> tuple[str, str] | None:
    """The picture and its best label; None where it has none."""
    return (answer.image.reference, answer.tags[0].label) if answer.image and answer.tags else None


def _labels(field: Field, ids: list[str]) -> set[tuple[str, str]]:
    """Pictures and their best labels, as the worker says them when nothing disturbs it."""
    answers = _answers(field)
    return {best for one in ids if (best := _best(answers[one]))}


def _mistagged(field: Field, truth: set[tuple[str, str]], guilty: set[str]) -> list[str]:
    """Complaints about good pictures whose best label is not the one that they have alone."""
    wrongly = [
        job_id
        for job_id, answer in _answers(field).items()
        if job_id not in guilty and (best := _best(answer)) and best not in truth
    ]
    return [f"{len(wrongly)} good pictures have another label than alone, first {wrongly[:3]}"] if wrongly else []
