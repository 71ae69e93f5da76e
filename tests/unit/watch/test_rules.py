"""The file of rules: what matches, what is sent, and what an error says."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu.client.sender import SendOptions
from shiwu.contract import Lane
from shiwu.watch.events import ObjectStored
from shiwu.watch.rules import Rules, RulesError, read_rules

EXAMPLE = """
- match: {bucket: photos, prefix: in/, suffix: [.jpg, .PNG]}
  lane: interactive
  labels: moderation
  metadata: {team: a}
  want: [tags, vector]
  answer_by_s: 60
- match: {bucket: [photos, scans], prefix: [a/, b/]}
  labels: [猫, 狗, on]
  version: true
- match: {bucket: last}
"""


def write(folder: Path, text: str) -> Path:
    """A file of rules."""
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    """The rules of the example."""
    return read_rules(write(tmp_path, EXAMPLE))


def test_rules_are_read(rules: Rules) -> None:
    """What is not given is not sent; the lane is bulk."""
    first, second, third = rules.all
    assert first.options == SendOptions(Lane.INTERACTIVE, answer_by_s=60)
    assert first.fields == {"labels": "moderation", "metadata": {"team": "a"}, "want": ["tags", "vector"]}
    assert (second.fields, second.has_version) == ({"labels": ["猫", "狗", "on"]}, True)
    assert (third.fields, third.options, third.has_version) == ({}, SendOptions(Lane.BULK), False)


@pytest.mark.parametrize(
    ("bucket", "key", "index"),
    [
        ("photos", "in/a.jpg", 0),
        ("photos", "in/a.JPG", 0),
        ("photos", "in/a.png", 0),
        ("photos", "a/a.jpg", 1),
        ("scans", "b/x", 1),
        ("last", "", 2),
        ("photos", "in/a.jpg.txt", None),
        ("photos", "In/a.jpg", None),
        ("photo", "in/a.jpg", None),
        ("scans", "in/a.jpg", None),
    ],
)
def test_first_rule_that_matches_wins(rules: Rules, bucket: str, key: str, index: int | None) -> None:
    """Bucket and prefix are exact; the suffix may have letters of any case."""
    assert rules.find(ObjectStored(bucket=bucket, key=key)) == index


def test_empty_match_is_every_object(tmp_path: Path) -> None:
    """As the last rule has it."""
    assert read_rules(write(tmp_path, "- match: {}")).find(ObjectStored(bucket="b", key="k")) == 0


WRONG = {
    "missing": ("", "file: expected a list of rules, each `- match: …`, got NoneType"),
    "object": ("match: {}", "file: expected a list of rules, each `- match: …`, got dict"),
    "none": ("[]", "at least 1 item"),
    "no-match": ("- lane: bulk", "rule 1: match: expected a value, there is none"),
    "unknown": ("- match: {}\n  lables: x", "rule 1: lables: expected one of match, lane, labels, top_k"),
    "unknown-match": ("- match: {}\n- match: {key: x}", "rule 2: match.key: expected one of bucket, prefix, suffix"),
    "lane": ("- match: {}\n  lane: fast", "rule 1: lane: expected 'interactive' or 'bulk', got 'fast'"),
    "suffix": ("- match: {suffix: [7]}", "rule 1: match.suffix.1: expected a text, got 7"),
    "no-suffix": ("- match: {suffix: []}", "rule 1: match.suffix: expected at least 1 item, got none"),
    "empty-prefix": (
        "- match: {prefix: ''}",
        "rule 1: match.prefix.1: expected a text of at least 1 character, got ''",
    ),
    "labels": ("- match: {}\n  labels: [a, a]", "rule 1: labels: expected every label once, got 'a' again"),
    "top-k": ("- match: {}\n- match: {}\n  top_k: 0", "rule 2: top_k:"),
    "metadata": (f"- match: {{}}\n  metadata: {'x' * 5000}", "rule 1: metadata: expected at most 4096 bytes"),
    "expires": ("- match: {}\n  expires_s: soon", "rule 1: expires_s: expected a number of seconds"),
    "priority": ("- match: {}\n  priority: 10", "rule 1: priority: expected a whole number, 0 to 9"),
    "yaml": ("- match: {", "expected YAML"),
    "large": (
        "- match: {}\n  labels: [" + ", ".join(f"{n:04}{'猫' * 96}" for n in range(1000)) + "]",
        "rule 1: expected messages of at most 262144 bytes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_say_what_was_expected(tmp_path: Path, name: str) -> None:
    """With the number of the rule."""
    text, expected = WRONG[name]
    with pytest.raises(RulesError) as caught:
        read_rules(write(tmp_path, text))
    assert expected in str(caught.value)


def test_missing_file_of_rules_is_named(tmp_path: Path) -> None:
    """With the reason."""
    with pytest.raises(RulesError, match=r"expected a readable file at .*gone\.yaml \(No such file"):
        read_rules(tmp_path / "gone.yaml")
