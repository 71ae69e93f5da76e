"""Label sets of version 2 on made vectors: the rate that was asked for, probabilities, and tags against plain code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract import ModelInfo, Request, Tag
from shiwu_worker.calibration import CalibrationOptions, Pool, calibrate
from shiwu_worker.calibration.curves import probabilities
from shiwu_worker.commands.rule_tables import RuleCalibration, label_cosines, tags_of
from shiwu_worker.commands.rule_tables import given as given_labels
from shiwu_worker.jobs.label_rules import CalibratedLabels, LabelRules
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.stages.score.label_files import load_label_set
from tests.support.rule_sets import random_units, write_set
from tests.support.scored_jobs import SCORER

WIDTH: Final = 32
MODEL: Final = ModelInfo(id="m", revision="r", dtype="float32", device="cpu")
PLAIN: Final[dict[str, Any]] = {"labels": ["a", {"label": "b", "texts": ["b", "bb", "bbb"]}, "c", "d"]}
RULES: Final[dict[str, Any]] = {
    "labels": ["a", {"label": "b", "texts": ["b", "bb", "bbb"]}, "c", {"label": "d", "hidden": True}],
    "groups": {"g": {"exclusive": True, "labels": ["a", "b", "d"], "parent": "top"}},
    "unknown": "none",
}


def encode(label_set: LabelSet, *, seed: int) -> EncodedLabels:
    """The set with random vectors of its texts."""
    return EncodedLabels(label_set, TextVectors(random_units(len(label_set.phrases), seed=seed, width=WIDTH)))


def background(count: int, *, seed: int) -> Pool:
    """Images in all directions, ten of each source. All are of one distribution, so only chance divides two pools."""
    return Pool(random_units(count, seed=seed, width=WIDTH), [str(number // 10) for number in range(count)])


def calibrated(folder: Path, fields: dict[str, Any], *, rate: float, seed: int) -> tuple[EncodedLabels, int]:
    """A set with the calibration file that the command would write, read from the files; and its number of images."""
    path = write_set(folder, {**fields, "head": "z", "calibration": "c.json"})
    encoded = encode(load_label_set(path, has_calibration=False), seed=seed)
    chosen = RuleCalibration(encoded, scale=20.0, bias=None)
    options = CalibrationOptions(false_rate=rate, seed=seed, is_forced=True)
    found = calibrate(background(1500, seed=seed), encoded.vectors, options, decision=chosen.decision)
    (folder / "c.json").write_bytes(chosen.file(found, options, MODEL))
    return replace(encoded, label_set=load_label_set(path)), found.images


@pytest.mark.parametrize(("rate", "fields"), [(0.05, PLAIN), (0.2, PLAIN), (0.05, RULES)], ids=["5", "20", "rules"])
def test_fresh_images_get_tags_at_the_rate(tmp_path: Path, rate: float, fields: dict[str, Any]) -> None:
    """Within 99.9 % of chance over seeds. A hidden label takes tags from its group, so that rate may be lower."""
    tagged = fitted = seen = 0
    for seed in range(12):
        encoded, images = calibrated(tmp_path, fields, rate=rate, seed=seed)
        new = background(1000, seed=seed + 500).vectors
        tags = tags_of(label_cosines(new, encoded), encoded, scale=20.0, bias=None)
        tagged += int(given_labels(tags, encoded.label_set).any(axis=1).sum())
        fitted, seen = fitted + images, seen + len(new)
    # The limit of each seed is chosen by chance too.
    bound = 3.3 * math.sqrt(rate * (1 - rate) * (1 / seen + 1 / fitted))
    assert tagged / seen <= rate + bound
    assert fields is RULES or tagged / seen >= rate - bound


def test_probabilities_of_answers_are_those_of_the_images(tmp_path: Path) -> None:
    """Images that show a label with a known probability: `p` recovers it, through the file, for labels with enough."""
    fields = {**PLAIN, "head": "z", "calibration": "c.json"}
    path = write_set(tmp_path, fields)
    encoded = encode(load_label_set(path, has_calibration=False), seed=3)
    pool, labelled = background(1500, seed=3), background(8000, seed=4).vectors
    cosines = label_cosines(labelled, encoded)
    z = (cosines - cosines.mean(axis=0)) / cosines.std(axis=0)
    true = probabilities(z.astype(np.float64), (2.0, -1.0))
    shows = np.random.default_rng(5).random(true.shape) < true
    shows[:, 3] = False
    chosen = RuleCalibration(encoded, scale=20.0, bias=None, labelled=cosines, shows=shows)
    options = CalibrationOptions(false_rate=0.05)
    found = calibrate(pool, encoded.vectors, options, decision=chosen.decision)
    (tmp_path / "c.json").write_bytes(chosen.file(found, options, MODEL))
    encoded = replace(encoded, label_set=load_label_set(path))
    request = Request(image="s3://b/k", top_k=9, min_cosine=-1.0)
    tags = SCORER.tags(cosines[:200], encoded, [request] * 200)
    for row, each in enumerate(tags):
        by_label = {tag.label: tag.p for tag in each}
        assert by_label["d"] is None
        assert [by_label[word] for word in "abc"] == pytest.approx(true[row, :3].tolist(), abs=0.07)


# ------------------------------------------------------------------------------------ rules, against plain code
def random_rules(chance: np.random.Generator, words: Sequence[str], *, has_z: bool) -> LabelSet:
    """A set with groups in two levels, hidden labels, limits and curves at random."""
    count, half = len(words), len(words) // 2
    # The labels of the second half may be parents of groups of the first half, and have groups of their own.
    groups = [f"g{chance.integers(2)}" if chance.random() < 0.7 else None for _ in range(half)]
    groups += ["top" if chance.random() < 0.5 else None for _ in range(count - half)]
    parent_of = {name: int(chance.integers(half, count)) for name in ("g0", "g1") if chance.random() < 0.6}
    parents = tuple(parent_of.get(group or "") for group in groups)
    unknown = count - 1 if chance.random() < 0.5 and count - 1 not in parents else None

    def some(share: float, low: float, high: float) -> tuple[float | None, ...]:
        return tuple(float(chance.uniform(low, high)) if chance.random() < share else None for _ in words)

    calibration = CalibratedLabels(
        digest="",
        revision="r",
        means=tuple(chance.normal(0, 0.1, count).tolist()),
        deviations=tuple(chance.uniform(0.1, 0.3, count).tolist()),
        z=float(chance.uniform(-1, 2)),
        curves=tuple(None if slope is None else (slope, -1.0) for slope in some(0.5, 0.5, 2.0)),
        thresholds=some(0.3, 0, 1),
    )
    rules = LabelRules(
        phrases=tuple(((("{}",), word),) for word in words),
        groups=tuple(groups),
        exclusive=frozenset(name for name in ("g0", "g1", "top") if chance.random() < 0.6),
        parents=parents,
        hidden=tuple(bool(chance.random() < 0.2) and place not in parents for place in range(count)),
        thresholds=some(0.4, 0, 1),
        unknown=unknown,
        aliases=((),) * count,
        calibration=calibration if has_z or chance.random() < 0.5 else None,
    )
    return LabelSet("made", tuple(words), head="z" if has_z else "softmax", rules=rules)


def plain_labels(label_set: LabelSet, cosines: Sequence[float], scores: Sequence[float], request: Request) -> list[str]:
    """The labels of one image, label by label, as the page of label sets describes them."""
    rules = label_set.rules
    assert rules is not None
    made, has_z, count = rules.calibration, label_set.head == "z", len(cosines)
    z = [(cosines[i] - made.means[i]) / made.deviations[i] for i in range(count)] if made else None
    curves = made.curves if made else (None,) * count
    rank = z if has_z and z else list(cosines)

    def passes(i: int) -> bool:
        curve, own = curves[i], rules.thresholds[i]
        limit = own if own is not None or made is None else made.thresholds[i]
        p = scores[i] if curve is None or z is None else 1 / (1 + math.exp(-(curve[0] * z[i] + curve[1])))
        is_decided_by_p = curve is not None or not has_z
        if request.min_cosine is not None:
            if cosines[i] < request.min_cosine:
                return False
            limit = None
        if request.threshold > 0:
            limit = request.threshold
        if is_decided_by_p and limit is not None:
            return p >= limit
        return not has_z or request.min_cosine is not None or (z is not None and made is not None and z[i] >= made.z)

    def wins(i: int) -> bool:
        group, parent = rules.groups[i], rules.parents[i]
        rivals = [j for j in range(count) if rules.groups[j] == group] if group in rules.exclusive else [i]
        return max(rivals, key=lambda j: (rank[j], -j)) == i and (parent is None or wins(parent))

    able = [i for i in range(count) if not rules.hidden[i] and i != rules.unknown and passes(i) and wins(i)]
    given_ones = set(sorted(able, key=lambda i: (-rank[i], i))[: request.top_k])
    for child in list(given_ones):
        at = rules.parents[child]
        while at is not None:
            given_ones.add(at)
            at = rules.parents[at]
    if not given_ones and rules.unknown is not None:
        return [label_set.words[rules.unknown]]
    return [label_set.words[i] for i in sorted(given_ones, key=lambda i: (-rank[i], i))]


REQUESTS: Final = st.builds(
    Request,
    image=st.just("s3://b/k"),
    top_k=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.3, 0.8]),
    min_cosine=st.sampled_from([None, -1.0, 0.1]),
)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.booleans(), REQUESTS)
def test_tags_are_those_of_plain_code(seed: int, count: int, has_z: bool, request: Request) -> None:
    """Any groups, parents, hidden labels, limits, curves and requests."""
    chance = np.random.default_rng(seed)
    label_set = random_rules(chance, [f"w{number}" for number in range(count)], has_z=has_z)
    encoded = EncodedLabels(label_set, TextVectors(random_units(count, seed=seed, width=8)))
    images = random_units(6, seed=seed + 1, width=8)
    cosines = images @ encoded.vectors.T
    found: list[tuple[Tag, ...]] = SCORER.tags(cosines, encoded, [request] * len(images))
    powers = np.exp(20.0 * cosines.astype(np.float64))
    scores = powers / powers.sum(axis=1, keepdims=True)
    for row, tags in enumerate(found):
        expected = plain_labels(label_set, cosines[row].tolist(), scores[row].tolist(), request)
        assert [tag.label for tag in tags] == expected
