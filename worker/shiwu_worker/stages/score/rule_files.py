"""Label files of version 2: texts, aliases, groups, limits and a calibration file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from shiwu.contract import Label, LabelSetName, labels_error
from shiwu_worker.jobs.label_rules import CalibratedLabels, LabelRules, Phrase
from shiwu_worker.jobs.label_set import LabelSet, SetHead
from shiwu_worker.stages.score.calibration_files import read_calibration
from shiwu_worker.stages.score.label_fields import AS_ITEMS, LABEL_COUNT, Bias, Scale, TemplateList

MAX_TEXTS: Final = 100
MAX_GROUPS: Final = 10_000
Threshold = Annotated[float, Field(ge=0, le=1)]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]{1,255}$")]


class RuleItem(BaseModel):
    """One label of the file."""

    model_config = ConfigDict(extra="forbid")

    label: Label
    texts: list[Label] | None = Field(default=None, min_length=1, max_length=MAX_TEXTS)
    aliases: list[Label] = Field(default=[], max_length=MAX_TEXTS)
    templates: TemplateList | None = None
    group: Label | None = None
    hidden: bool = False
    threshold: Threshold | None = None


class RuleGroup(BaseModel):
    """One group of the file."""

    model_config = ConfigDict(extra="forbid")

    exclusive: bool = False
    parent: Label | None = None
    threshold: Threshold | None = None
    labels: list[Label] = []


class RuleFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[2]
    name: LabelSetName
    labels: Annotated[list[RuleItem], AS_ITEMS, LABEL_COUNT]
    templates: TemplateList = ["{}"]
    head: SetHead = "softmax"
    scale: Scale | None = None
    bias: Bias | None = None
    unknown: Label | None = None
    calibration: FileName | None = None
    groups: dict[Label, RuleGroup] = Field(default={}, max_length=MAX_GROUPS)
    description: str = ""

    @model_validator(mode="after")
    def _check(self) -> RuleFile:
        words = [item.label for item in self.labels]
        if reason := labels_error([*words, *(alias for item in self.labels for alias in item.aliases)]):
            raise ValueError(f"labels and aliases: {reason}")
        for item in self.labels:
            if item.texts is not None and (reason := labels_error(item.texts)):
                raise ValueError(f"texts of {item.label}: {reason}")
        if self.head == "z" and self.calibration is None:
            raise ValueError("head: z compares with images without the labels: name the calibration file")
        return self

    def label_set(self, folder: Path | None) -> LabelSet:
        """The label set of the file.

        Args:
            folder: where the calibration file is; None leaves it out.

        Raises:
            ValueError: the groups contradict each other, or the calibration file is wrong.
        """
        items = {item.label: item for item in self.labels}
        named = [group.parent for group in self.groups.values()] + [self.unknown]
        # A parent, or the label of unknown images, may be missing in the list.
        items |= {word: RuleItem(label=word) for word in named if word is not None and word not in items}
        words = tuple(items)
        groups = dict(_groups_of(items, self.groups))
        phrases = tuple(_phrases(item, self.templates) for item in items.values())
        rules = LabelRules(
            phrases=phrases,
            groups=tuple(groups.get(word) for word in words),
            exclusive=frozenset(name for name, group in self.groups.items() if group.exclusive),
            parents=_parents(words, groups, self.groups),
            hidden=tuple(item.hidden for item in items.values()),
            thresholds=tuple(_threshold(item, self.groups.get(groups.get(word, ""))) for word, item in items.items()),
            unknown=None if self.unknown is None else words.index(self.unknown),
            aliases=tuple(tuple(item.aliases) for item in items.values()),
            calibration=self._calibration(folder, words, phrases),
        )
        _check_roles(words, rules)
        return LabelSet(
            name=self.name,
            words=words,
            templates=tuple(self.templates),
            head=self.head,
            scale=self.scale,
            bias=self.bias,
            calibrated_for=None if rules.calibration is None else rules.calibration.revision,
            rules=rules,
        )

    def _calibration(
        self, folder: Path | None, words: Sequence[str], phrases: Sequence[Sequence[Phrase]]
    ) -> CalibratedLabels | None:
        if folder is None or self.calibration is None:
            return None
        return read_calibration(folder / self.calibration, words, phrases)


def _phrases(item: RuleItem, templates: Sequence[str]) -> tuple[Phrase, ...]:
    own = tuple(item.templates or templates)
    return tuple((own, text) for text in item.texts or [item.label])


def _threshold(item: RuleItem, group: RuleGroup | None) -> float | None:
    return item.threshold if item.threshold is not None or group is None else group.threshold


def _groups_of(items: Mapping[str, RuleItem], groups: Mapping[str, RuleGroup]) -> Iterator[tuple[str, str]]:
    """Each label with its group.

    Raises:
        ValueError: a group or a label is not in the file, or a label has two groups.
    """
    found: dict[str, str] = {}
    named = [(item.group, label) for label, item in items.items() if item.group is not None]
    named += [(name, label) for name, group in groups.items() for label in group.labels]
    for name, label in named:
        if name not in groups:
            raise ValueError(f"labels: group of {label}: expected one of groups, got {name!r}")
        if label not in items:
            raise ValueError(f"groups: labels of {name}: expected labels of the set, got {label!r}")
        if found.setdefault(label, name) != name:
            raise ValueError(f"groups: expected one group for {label}, got {found[label]!r} and {name!r}")
    yield from found.items()


def _parents(words: Sequence[str], groups: Mapping[str, str], named: Mapping[str, RuleGroup]) -> tuple[int | None, ...]:
    """The parent of each label, by the group that it is in.

    Raises:
        ValueError: a label would be its own parent.
    """
    places = {word: index for index, word in enumerate(words)}
    parents = [named[groups[word]].parent if word in groups else None for word in words]
    found = tuple(None if parent is None else places[parent] for parent in parents)
    for start in range(len(words)):
        seen, at = {start}, found[start]
        while at is not None:
            if at in seen:
                raise ValueError(f"groups: expected parents without a circle, got one through {words[at]!r}")
            seen.add(at)
            at = found[at]
    return found


def _check_roles(words: Sequence[str], rules: LabelRules) -> None:
    parents = {parent for parent in rules.parents if parent is not None}
    for index in sorted(parents):
        if rules.hidden[index] or index == rules.unknown:
            role = "hidden" if rules.hidden[index] else "the label for unknown images"
            raise ValueError(f"groups: expected a parent that images can get, got {words[index]!r}, which is {role}")
    if all(rules.hidden[index] or index == rules.unknown for index in range(len(words))):
        raise ValueError("labels: expected a label that images can get, got hidden ones only")


def read_rule_file(content: dict[Any, Any]) -> RuleFile:
    """Check the content of a file.

    Raises:
        pydantic.ValidationError: it is not as it should be.
    """
    return RuleFile.model_validate(content)
