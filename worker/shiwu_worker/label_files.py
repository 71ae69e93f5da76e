"""Reads label sets from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shiwu.contract import Head, Label, LabelSetName, control_character, labels_error
from shiwu_worker.label_set import LabelSet

MAX_FILE_LABELS: Final = 100_000


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: LabelSetName
    labels: list[Label] = Field(min_length=1, max_length=MAX_FILE_LABELS)
    templates: list[str] = Field(default=["{}"], min_length=1, max_length=200)
    head: Head = "softmax"
    description: str = ""

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"expected exactly one {{}} in every template, got {template!r:.80}")
            if found := control_character(template):
                raise ValueError(f"expected templates without control characters, got {found} in {template!r:.80}")
        return templates

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: list[str]) -> list[str]:
        if reason := labels_error(labels):
            raise ValueError(reason)
        return labels


def load_label_sets(folders: Sequence[Path]) -> dict[str, LabelSet]:
    """Read every *.yaml of the folders; a later folder replaces sets of the same name.

    Raises:
        ValueError: names the file and what is wrong in it.
    """
    sets: dict[str, LabelSet] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder of label sets")
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            try:
                read = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"{path}: expected readable YAML ({error})") from error
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"{path}: {where or 'file'}: {first['msg']}") from error
            sets[read.name] = LabelSet(read.name, tuple(read.labels), tuple(read.templates), read.head)
    return sets
