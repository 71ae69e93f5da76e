"""Reads label sets from YAML files; errors tell what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shiwu.contract import Head, Label, LabelSetName, labels_error
from shiwu.contract.validation_text import expected_and_got
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.calibration_files import (
    CalibrationFile,
    LabelFigures,
    RateAside,
    StaleCalibration,
    texts_digest,
)
from shiwu_worker.stages.score.label_fields import AS_ITEMS, LABEL_COUNT, Bias, Scale, TemplateList
from shiwu_worker.stages.score.rule_files import RuleFile, RuleGroup, RuleItem, read_rule_file

__all__ = [
    "CalibrationFile",
    "LabelFigures",
    "RateAside",
    "StaleCalibration",
    "load_label_set",
    "load_label_sets",
    "read_calibrations",
    "texts_digest",
]
SUFFIXES: Final = {".yaml", ".yml"}
TEXT_TAG: Final = "tag:yaml.org,2002:str"
WIDE_COMMAS: Final = "，、"
TEXT_KEYS: Final = {"name", "description", "label", "group", "parent", "unknown"}
RULES_VERSION: Final = 2


Cosine = Annotated[float, Field(ge=-1, le=1)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: Label
    min_cosine: Cosine | None = None


class _Calibration(BaseModel):
    """How the limits of a set were chosen, as `shiwu-worker labels calibrate` writes it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str = Field(min_length=1)
    false_rate: float
    false_rate_aside: float
    false_rate_aside_low: float
    false_rate_aside_high: float
    images: int
    images_aside: int
    by_source: bool
    z: float
    seed: int


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: LabelSetName
    labels: Annotated[list[_Item], AS_ITEMS, LABEL_COUNT]
    templates: TemplateList = ["{}"]
    head: Head = "softmax"
    scale: Scale | None = None
    bias: Bias | None = None
    min_cosine: Cosine | None = None
    description: str = ""
    calibration: _Calibration | None = None
    version: Literal[1] = 1

    def label_set(self) -> LabelSet:
        """The label set of the file."""
        min_cosines = [self.min_cosine if item.min_cosine is None else item.min_cosine for item in self.labels]
        return LabelSet(
            name=self.name,
            words=tuple(item.label for item in self.labels),
            templates=tuple(self.templates),
            head=self.head,
            scale=self.scale,
            bias=self.bias,
            min_cosines=(
                None if set(min_cosines) == {None} else tuple(-1.0 if least is None else least for least in min_cosines)
            ),
            calibrated_for=self.calibration.revision if self.calibration is not None else None,
        )

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: list[_Item]) -> list[_Item]:
        if reason := labels_error([item.label for item in labels]):
            raise ValueError(reason)
        return labels


def load_label_sets(folders: Sequence[Path], *, has_calibrations: bool = True) -> dict[str, LabelSet]:
    """Read every YAML file of the folders; a later folder replaces sets of the same name.

    Args:
        has_calibrations: whether calibration files are read; without them a set cannot decide by z.

    Raises:
        ValueError: names the file and the error in it, or two files of one folder with the same set name.
    """
    sets: dict[str, LabelSet] = {}
    for folder in folders:
        files: dict[str, Path] = {}
        for path in _label_files(folder):
            label_set = load_label_set(path, has_calibration=has_calibrations)
            name = str(label_set.name)
            if other := files.get(name):
                raise ValueError(f"{path}: name: expected a name of its own, got {name!r}, the name in {other}")
            files[name] = path
            sets[name] = label_set
    return sets


def _label_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, by name.

    Raises:
        ValueError: it is no folder, or cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        text = f"{folder}: expected a folder of label sets that can be read ({error.strerror})"
        raise ValueError(text) from error


def load_label_set(path: Path, *, has_calibration: bool = True) -> LabelSet:
    """Read one YAML file, and the calibration file beside it that it names.

    Raises:
        StaleCalibration: the calibration file was made for other labels or texts.
        ValueError: names the file and the error in it.
    """
    try:
        content = _read_yaml(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and content.get("version") == RULES_VERSION:
            return read_rule_file(content).label_set(path.parent if has_calibration else None)
        return _File.model_validate(content).label_set()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line}: expected UTF-8, got other bytes; save the file as UTF-8") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_error(error)}") from error
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected readable YAML ({error})") from error
    except StaleCalibration as error:
        raise StaleCalibration(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_calibrations(folder: Path) -> dict[str, LabelSet | ValueError]:
    """The sets of version 2 in this folder that name a calibration file, or what is wrong with that file.

    Raises:
        ValueError: names a label file and the error in it.
    """
    found: dict[str, LabelSet | ValueError] = {}
    for path in _label_files(folder):
        plain = load_label_set(path, has_calibration=False)
        if plain.rules is None:
            continue
        try:
            label_set = load_label_set(path)
        except ValueError as error:
            found[str(plain.name)] = error
        else:
            if label_set.rules is not None and label_set.rules.calibration is not None:
                found[str(plain.name)] = label_set
    return found


def _first_error(error: ValidationError) -> str:
    # A misspelled key gives two errors: it is unknown, and the correct one is missing.
    first = min(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    where = [f"number {part + 1}" if isinstance(part, int) else part for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *where, key = where
        known = ", ".join(_model_at(error.title, where).model_fields)
        return f"{' '.join(where) or 'file'}: expected keys of {known}, got {key!r:.80}"
    return f"{' '.join(where) or 'file'}: {expected_and_got(first)}"


def _model_at(title: str, where: Sequence[str]) -> type[BaseModel]:
    """The model of the part of a file whose key is unknown."""
    if title == RuleFile.__name__:
        return RuleFile if not where else RuleGroup if where[0] == "groups" else RuleItem
    return _Item if where else _File


# ------------------------------------------------------------------------------------ YAML that may mean another thing
def _read_yaml(text: str) -> Any:
    """The content of the file.

    Raises:
        yaml.YAMLError: when it is no YAML.
        ValueError: when it is YAML whose meaning is probably not what its author intends.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for wrong, why in _probable_mistakes(node):
            raise ValueError(f"line {wrong.start_mark.line + 1}: {why}")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _probable_mistakes(node: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    if isinstance(node, yaml.MappingNode):
        yield from _repeated_keys(node)
        for key, value in node.value:
            yield from _probable_mistakes(value)
            if key.value in TEXT_KEYS:
                yield from _values_that_are_no_text(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _probable_mistakes(item)
            yield from _values_that_are_no_text(item)
            if node.flow_style and _is_plain(item) and (found := set(WIDE_COMMAS) & set(item.value)):
                yield (
                    item,
                    f"expected commas between the items of [ ], got {found.pop()!r} in {item.value!r:.80}; write "
                    "[猫, 狗], or quote an item that holds such a comma",
                )


def _repeated_keys(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, str]]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                yield key, f"expected every key once, got {key.value!r} again"
            seen.add(key.value)


def _values_that_are_no_text(node: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """Find values that are no text: YAML reads `no` as false and 123 as a number."""
    if isinstance(node, yaml.ScalarNode) and node.tag != TEXT_TAG:
        kind = node.tag.rpartition(":")[2]
        quoted = f'"{node.value:.80}"'
        yield node, f"expected a text, got {node.value!r:.80}, which YAML reads as {kind}; write it in quotes: {quoted}"


def _is_plain(node: yaml.Node) -> bool:
    """Whether a node is a text without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None
