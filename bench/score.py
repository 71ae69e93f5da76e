"""What scoring costs the worker's score thread, by the number of labels.

Random unit vectors and labels; jobs that want five tags. CPU time of one thread, so that other programs on the machine
matter little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.scored_jobs import encoded, make_job, units

from bench.charts import Chart, Series
from bench.report import Headline, Report, Table, median, number, ratio
from shiwu.contract import ModelInfo
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.runtime.blas import use_one_blas_thread
from shiwu_worker.stages.score.scorer import Scorer, probabilities_of, top_tags

SCALE: Final = 100.0
"""CLIP's."""
TOP_K: Final = 5
ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of one image."""

    batch: int
    labels: int
    total_us: float
    """Of the score thread."""
    product_us: float
    """The matrix product."""
    softmax_us: float
    tags_us: float
    """The best labels, and their tags."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run found."""

    costs: tuple[Cost, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How it was run."""

    quick: bool
    labels: tuple[int, ...]
    batches: tuple[int, ...]
    width: int
    seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--labels", default="8,256,1000,3000,10000", help="labels of the set; default %(default)s")
    parser.add_argument("--batches", default="64,256", help="images of a batch; default %(default)s")
    parser.add_argument("--width", type=int, default=512, help="length of a vector; default %(default)s")
    parser.add_argument("--seconds", type=float, help="for each figure; default 1")


def run(asked: argparse.Namespace) -> Report:
    """Score batches of every size with every number of labels."""
    use_one_blas_thread()
    options = Options(
        quick=asked.quick,
        labels=tuple(int(text) for text in asked.labels.split(",")),
        batches=tuple(int(text) for text in asked.batches.split(",")),
        width=asked.width,
        seconds=asked.seconds or (0.05 if asked.quick else 1.0),
    )
    costs = [_cost(batch, count, options) for batch in options.batches for count in options.labels]
    return _report(options, costs)


def _cost(batch: int, count: int, options: Options) -> Cost:
    labels = encoded(LabelSet("bench", tuple(f"word {i}" for i in range(count))), seed=1, width=options.width)
    jobs = [make_job(i, labels, top_k=TOP_K) for i in range(batch)]
    vectors = units(batch, options.width)
    scorer = Scorer(scale=SCALE, bias=None, model=ModelInfo(id="m", revision="r", dtype="float32", device="cpu"))
    cosines = vectors @ labels.vectors.T
    scores = probabilities_of(cosines, head="softmax", scale=SCALE, bias=None)
    words = labels.label_set.words

    def us_of(work: Callable[[], object]) -> float:
        return median([_pass_s(work, options.seconds / ROUNDS) for _ in range(ROUNDS)]) / batch * 1e6

    def score() -> None:
        scorer.score(jobs, vectors)

    cost = Cost(
        batch=batch,
        labels=count,
        total_us=us_of(score),
        product_us=us_of(lambda: vectors @ labels.vectors.T),
        softmax_us=us_of(lambda: probabilities_of(cosines, head="softmax", scale=SCALE, bias=None)),
        tags_us=us_of(lambda: top_tags(scores, cosines, words, top_k=[TOP_K] * batch, threshold=[0.0] * batch)),
    )
    print(f"  {batch} images, {count} labels: {number(cost.total_us)} µs", flush=True)
    return cost


def _pass_s(work: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one call on this thread."""
    work()
    times, began_s, until_s = 0, time.thread_time(), time.monotonic() + seconds
    while not times or time.monotonic() < until_s:
        work()
        times += 1
    return (time.thread_time() - began_s) / times


def _report(options: Options, costs: Sequence[Cost]) -> Report:
    names = [f"{cost.batch} images, {cost.labels:,} labels" for cost in costs]
    rows = tuple(
        (
            name,
            *(number(each) for each in (cost.total_us, cost.product_us, cost.softmax_us, cost.tags_us)),
            number(ratio(1e6, cost.total_us)),
        )
        for name, cost in zip(names, costs, strict=True)
    )
    head = ("batch", "µs/image", "product", "softmax", "best labels", "images/s of the thread")
    return Report(
        name="score",
        headlines=tuple(
            Headline(f"µs/image, {name}", cost.total_us, "µs", "less") for name, cost in zip(names, costs, strict=True)
        ),
        tables=(Table("Scoring on one thread of the host, five tags for each image", head, rows),),
        charts=(
            Chart(
                "CPU of the score thread for an image",
                tuple(names),
                (Series("all", tuple(cost.total_us for cost in costs)),),
                "µs",
            ),
        ),
        figures=Figures(tuple(costs)),
        settings=options,
        notes=("with the fewest labels nearly all is Python under its lock; numpy's calls on many labels release it",),
    )
