"""Label files of version 2: what they say, which faults they may have, and what their digests cover."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_files import StaleCalibration, load_label_set, read_calibrations
from tests.support.rule_sets import read_set, write_calibration, write_set

FULL: dict[str, Any] = {
    "templates": ["一张{}的照片"],
    "unknown": "其他",
    "labels": [
        "猫",
        {"label": "狗", "texts": ["狗", "小狗"], "aliases": ["dog"], "threshold": 0.42},
        {"label": "血腥", "group": "risk", "templates": ["{}的场面"]},
        {"label": "文字", "hidden": True},
    ],
    "groups": {
        "risk": {"threshold": 0.6},
        "animal": {"exclusive": True, "labels": ["猫", "狗"], "parent": "动物"},
    },
}
WRONG = [
    ({"labels": [{"label": "a", "group": "g"}]}, "group of a: expected one of groups, got 'g'"),
    ({"labels": ["a"], "groups": {"g": {"labels": ["b"]}}}, "labels of g: expected labels of the set, got 'b'"),
    ({"labels": ["a"], "groups": {"g": {"labels": ["a"]}, "h": {"labels": ["a"]}}}, "expected one group for a"),
    ({"labels": ["a"], "groups": {"g": {"labels": ["a"], "parent": "a"}}}, "without a circle"),
    ({"labels": [{"label": "a", "aliases": ["b"]}, "b"]}, "expected every label once, got 'b' again"),
    ({"labels": [{"label": "a", "texts": []}]}, "texts"),
    ({"labels": [{"label": "a", "min_cosine": 0.2}]}, "expected keys of label, texts"),
    ({"labels": ["a"], "groups": {"g": {"head": "z"}}}, "expected keys of exclusive, parent"),
    ({"labels": ["a"], "head": "z"}, "name the calibration file"),
    ({"labels": ["a"], "calibration": "../c.json"}, "calibration"),
    ({"labels": ["a"], "calibration": "c.json"}, "c.json"),
    ({"labels": [{"label": "a", "hidden": True}]}, "hidden ones only"),
    (
        {"labels": ["a", {"label": "b", "hidden": True}], "groups": {"g": {"labels": ["a"], "parent": "b"}}},
        "got 'b', which is hidden",
    ),
    ({"labels": [{"label": "a", "threshold": 1.5}]}, "threshold"),
    ({"labels": ["a"], "version": 3}, "version"),
]


@pytest.mark.parametrize(("fields", "wrong"), WRONG)
def test_error_names_the_file_and_the_fault(tmp_path: Path, fields: dict[str, Any], wrong: str) -> None:
    """The error says which file, and what in it."""
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        read_set(tmp_path, **fields)
    assert wrong in str(caught.value)


def test_file_with_everything_is_read(tmp_path: Path) -> None:
    """A parent and the label for unknown images need not be listed; limits of a group are those of its labels."""
    found = read_set(tmp_path, **FULL)
    assert found.words == ("猫", "狗", "血腥", "文字", "动物", "其他")
    rules = found.rules
    assert rules is not None
    assert rules.phrases[1] == ((("一张{}的照片",), "狗"), (("一张{}的照片",), "小狗"))
    assert rules.phrases[2] == ((("{}的场面",), "血腥"),)
    assert rules.groups == ("animal", "animal", "risk", None, None, None)
    assert rules.parents == (4, 4, None, None, None, None)
    assert rules.thresholds == (None, 0.42, 0.6, None, None, None)
    assert (rules.unknown, rules.hidden[3], rules.aliases[1]) == (5, True, ("dog",))
    assert (found.info.count, found.info.calibration) == (6, None)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": float("nan")},
        {"deviation": 0.0},
        {"curve": [1e400, 0]},
        {"other": 1},
    ],
)
def test_calibration_of_other_labels_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """With figures that are no numbers, or with fields that are not known."""
    fields = {"labels": ["a", "b"], "head": "z", "calibration": "c.json"}
    write_calibration(tmp_path, fields)
    assert read_set(tmp_path, **fields).rules is not None
    write_calibration(tmp_path, fields, b=change)
    with pytest.raises(ValueError, match=r"mine\.yaml: .*c\.json: expected a file that"):
        read_set(tmp_path, **fields)


def test_calibration_of_other_texts_is_stale(tmp_path: Path) -> None:
    """The text has a code; a set whose file is missing has another error."""
    fields = {"labels": ["a", "b"], "head": "z", "calibration": "c.json"}
    write_calibration(tmp_path, fields, b={"texts": "0" * 16})
    stale = r"mine\.yaml: .*c\.json: calibration_stale: .* got one of other texts or templates of 'b'"
    with pytest.raises(StaleCalibration, match=stale):
        read_set(tmp_path, **fields)
    (tmp_path / "c.json").unlink()
    with pytest.raises(ValueError, match="there is none yet"):
        read_set(tmp_path, **fields)
    [error] = read_calibrations(tmp_path).values()
    assert not isinstance(error, StaleCalibration)


def test_new_label_needs_a_new_calibration(tmp_path: Path) -> None:
    """A label without figures could not be compared with its background."""
    fields = {"labels": ["a"], "head": "z", "calibration": "c.json"}
    write_calibration(tmp_path, fields)
    with pytest.raises(ValueError, match="got none of 'b'; calibrate the label set again"):
        read_set(tmp_path, **{**fields, "labels": ["a", "b"]})


def test_calibration_changes_its_digest_and_that_of_the_set(tmp_path: Path) -> None:
    """Answers name both, so the figures behind a tag can be told."""
    fields = {"labels": ["a", "b"], "head": "z", "calibration": "c.json"}
    digests = set()
    for z, figures in ((3.0, {}), (2.5, {}), (3.0, {"mean": 0.1}), (3.0, {"curve": [2.0, -5.0]}), (3.0, {})):
        write_calibration(tmp_path, fields, z=z, a=figures)
        info = read_set(tmp_path, **fields).info
        digests.add((info.digest, info.calibration))
    assert len(digests) == 4
    assert len({digest for digest, _ in digests}) == len({calibration for _, calibration in digests}) == 4


# -------------------------------------------------------------------------------- digests
def _read(fields: dict[str, Any]) -> LabelSet:
    with tempfile.TemporaryDirectory() as folder:
        return load_label_set(write_set(Path(folder), fields))


def _item(label: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"label": st.just(label)},
        optional={
            "texts": st.lists(st.sampled_from(["t", "u", label]), min_size=1, unique=True),
            "templates": st.sampled_from([["{}"], ["a {}"], ["a {}", "{}"]]),
            "group": st.sampled_from(["g", "h"]),
            "hidden": st.booleans(),
            "threshold": st.sampled_from([0.2, 0.5]),
        },
    )


def _can_give_a_label(fields: dict[str, Any]) -> bool:
    """Files whose labels are all hidden or for unknown images are refused."""
    return any(not item.get("hidden") and item["label"] != fields.get("unknown") for item in fields["labels"])


FIELDS = st.fixed_dictionaries(
    {
        "labels": st.tuples(_item("a"), _item("b"), st.just({"label": "c"})).map(list),
        "groups": st.fixed_dictionaries(
            {
                name: st.fixed_dictionaries(
                    {}, optional={"exclusive": st.booleans(), "threshold": st.sampled_from([0.2, 0.5])}
                )
                for name in ("g", "h")
            }
        ),
    },
    optional={"unknown": st.sampled_from(["c", "d"]), "head": st.just("softmax"), "scale": st.just(50.0)},
).filter(_can_give_a_label)


def _meaning(label_set: LabelSet) -> object:
    """Everything of a set that scoring reads, written down without the code of the digest."""
    rules = label_set.rules
    assert rules is not None
    tables = rules.tables
    used = {group for group in rules.groups if group}
    return (
        label_set.words,
        label_set.head,
        label_set.scale,
        [frozenset(each) for each in rules.phrases],
        rules.groups,
        rules.exclusive & used,
        rules.parents,
        tables.can_be_given.tolist(),
        rules.thresholds,
        rules.unknown,
    )


@given(FIELDS, FIELDS)
def test_digests_are_equal_when_the_rules_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Files that mean the same have one digest, and files that do not have two."""
    first, second = _read(one), _read(other)
    assert (first.info.digest == second.info.digest) == (_meaning(first) == _meaning(second))


@given(FIELDS, st.data())
def test_digest_ignores_what_changes_no_answer(fields: dict[str, Any], data: st.DataObject) -> None:
    """Aliases, a description, the name, the order of texts, and on which side a group is written."""
    labels = [dict(item) for item in fields["labels"]]
    groups = {name: dict(group) for name, group in fields["groups"].items()}
    for item in labels:
        if "texts" in item:
            item["texts"] = data.draw(st.permutations(item["texts"]))
        if "group" in item and data.draw(st.booleans()):
            groups[item["group"]].setdefault("labels", []).append(item["label"])
            del item["group"]
    labels[0]["aliases"] = ["alias"]
    changed = {**fields, "labels": labels, "groups": groups, "description": "x", "name": "other"}
    assert _read(changed).info.digest == _read(fields).info.digest
