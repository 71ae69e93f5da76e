"""The shadow label set: what it changes is counted and logged, answers stay, and nothing waits for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import structlog
from click.testing import CliRunner
from numpy.typing import NDArray

from shiwu.contract import ImageInfo
from shiwu_worker.__main__ import main
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.service import shadow
from shiwu_worker.service.shadow import ShadowOptions, ShadowScorer
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.label_banks import make_bank
from tests.support.rule_sets import text_vector
from tests.support.scored_jobs import SCORER, make_job
from tests.support.waiting import wait_until

NOW: Final = LabelSet("now", ("cat", "dog", "bird"))
NEXT: Final = LabelSet("next", ("cat", "dog", "car"), min_cosines=(-1.0, 0.9, 0.9))


class Reports:
    """What a shadow reports."""

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()

    def __call__(self, images: Mapping[str, int], tags: Mapping[str, int]) -> None:
        """Add the counts."""
        self.images.update(images)
        self.tags.update(tags)


@contextmanager
def running(bank: LabelBank, reports: Reports, *, share: float = 1.0) -> Iterator[ShadowScorer]:
    """A shadow whose thread runs, and which has compared everything at the end."""
    made = ShadowScorer(ShadowOptions("next", "now", share), bank=bank, scorer=SCORER, on_compared=reports)
    made.thread.start()
    yield made
    assert made.thread.close(10)


def scored(
    bank: LabelBank, vectors: NDArray[np.float32], *, name: str | tuple[str, ...] = "now", **fields: Any
) -> list[Job]:
    """Jobs with these vectors, and their tags."""
    found = []
    for number, _ in enumerate(vectors):
        job = make_job(number, bank.encoded(bank.resolve(name)), **fields)
        job.sha256 = f"{number * 2**32 // len(vectors):08x}"
        job.image = ImageInfo(f"s3://b/{number}.jpg")
        found.append(job)
    SCORER.score(found, vectors)
    return found


def images() -> NDArray[np.float32]:
    """One image of each word, of other words first."""
    return np.stack([text_vector(word) for word in ("cat", "dog", "bird", "car")])


def test_differences_are_counted_and_logged() -> None:
    """`car` is new and `bird` is gone; the answers stay, and the counts are those of the images."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    jobs = scored(bank, images(), top_k=1)
    before = [job.tags for job in jobs]
    with structlog.testing.capture_logs() as logs, running(bank, reports) as made:
        made.encoded(jobs, images())
    assert [job.tags for job in jobs] == before
    assert reports.images == {"same": 2, "first": 2, "changed": 0}
    [line] = [each for each in logs if each["event"] == "shadow_compared"]
    changes = {label: numbers for label, *numbers in line["changes"]}
    assert changes["car"] == [0, 1, 0, "s3://b/3.jpg"]
    assert changes["bird"] == [0, 0, 1, "s3://b/2.jpg"]
    assert (line["images"], line["tags_same"], line["dropped"]) == (4, 2, 0)
    assert (line["digest"], line["shadow_digest"]) == (NOW.info.digest, NEXT.info.digest)
    assert reports.tags == {"same": 2, "added": line["tags_added"], "removed": line["tags_removed"]}


@pytest.mark.parametrize("want", [["tags"], ["tags", "vector"]])
def test_set_that_shadows_itself_changes_nothing(want: list[str]) -> None:
    """Tags beside a vector are made from the rounded vector, by the shadow too."""
    twin = replace(NOW, name="next")
    bank, reports = make_bank(NOW, twin), Reports()
    vectors = np.asarray(np.random.default_rng(3).standard_normal((64, 6)), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with running(bank, reports) as made:
        made.encoded(scored(bank, vectors, want=want), vectors)
    assert reports.images == {"same": 64, "first": 0, "changed": 0}


def test_share_is_chosen_by_image() -> None:
    """A quarter of the hashes is in, and the same ones again; jobs of other labels and heads are not compared."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    vectors = np.repeat(images(), 4, axis=0)
    with running(bank, reports, share=0.25) as made:
        made.encoded(scored(bank, vectors), vectors)
        made.encoded(scored(bank, vectors, name="next"), vectors)
        made.encoded(scored(bank, vectors, name=("cat", "dog", "bird")), vectors)
        made.encoded(scored(bank, vectors, want=["embedding"]), vectors)
    assert sum(reports.images.values()) == 4


def test_late_shadow_drops_images_and_delays_no_job() -> None:
    """Without its thread the queue fills up; without vectors of the labels nothing can be compared."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    made = ShadowScorer(ShadowOptions("next", "now", 1.0), bank=bank, scorer=SCORER, on_compared=reports)
    jobs = scored(bank, images())
    for _ in range(shadow.MAX_WAITING + 3):
        made.encoded(jobs, images())
    assert reports.images == {"dropped": 12}
    without = make_bank(NOW, NEXT, has_vectors=False)
    with running(without, reports) as other:
        other.encoded(jobs, images())
    assert reports.images == {"dropped": 16}


def test_failing_shadow_is_logged_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On either thread: the jobs have their tags, and the process goes on."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    jobs = scored(bank, images())
    with structlog.testing.capture_logs() as logs:
        with running(bank, reports) as made:
            made.encoded(jobs, images()[:1])
            assert [each["event"] for each in logs] == ["shadow_failed"]
            made.encoded(jobs, images())
        monkeypatch.setattr(bank, "known", lambda _: 1 // 0)
        with running(bank, reports) as other:
            other.encoded(jobs, images())
            wait_until(lambda: len(logs) == 2, timeout_s=10, what="the second error")
    assert reports.images == {}


def test_reload_begins_a_new_line() -> None:
    """Counts of two versions of a set are never added up."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    newer = replace(NEXT, min_cosines=None)
    with structlog.testing.capture_logs() as logs, running(bank, reports) as made:
        made.encoded(scored(bank, images()), images())
        wait_until(lambda: sum(reports.images.values()) == 4, timeout_s=10, what="the first images")
        bank.install({"now": NOW, "next": newer}, [bank.encoded(newer)])
        made.encoded(scored(bank, images()), images())
    lines = [each for each in logs if each["event"] == "shadow_compared"]
    assert [each["shadow_digest"] for each in lines] == [NEXT.info.digest, newer.info.digest]
    assert [each["images"] for each in lines] == [4, 4]


def test_command_adds_up_log_lines_of_workers() -> None:
    """Lines of several workers, between others and behind a prefix; each pair of sets has its own sum."""
    bank, reports = make_bank(NOW, NEXT), Reports()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            with running(bank, reports) as made:
                made.encoded(scored(bank, images(), top_k=1), images())
    text = "\n".join(["no json", *(f"[pod/a] {json.dumps(each)}" for each in logs), '{"event": "shadow_compared"}'])
    done = CliRunner().invoke(main, ["labels", "shadow", "-", "--json"], input=text)
    [found] = json.loads(done.stdout)
    assert (found["label_set"], found["shadow"], found["images"], found["same"]) == ("now", "next", 8, 4)
    assert found["tags_same"] == 4
    [car] = [each for each in found["labels"] if each["label"] == "car"]
    assert (car["added"], car["images"]) == (2, ["s3://b/3.jpg"] * 2)
    done = CliRunner().invoke(main, ["labels", "shadow", "-"], input=text)
    assert "8 images: 4 with the same tags, 4 with another first tag" in done.stdout
    done = CliRunner().invoke(main, ["labels", "shadow", "-"], input="nothing")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "SHIWU_SHADOW" in done.stderr
