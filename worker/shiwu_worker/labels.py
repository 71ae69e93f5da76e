"""Label sets by name, and their text vectors, computed once and kept."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shiwu.contract import ErrorCode, Head, Label, LabelSetName, LabelsInfo, Stage
from shiwu_worker.errors import Rejected

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_FILE_LABELS = 100_000


@dataclass(frozen=True)
class LabelSet:
    """Words to compare pictures with, and how their scores are made."""

    name: str | None
    words: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    head: Head = "softmax"

    @cached_property
    def vectors_key(self) -> str:
        """Names the text vectors: the head does not change them."""
        return _digest("\n".join(self.templates), "\n".join(self.words))

    @cached_property
    def info(self) -> LabelsInfo:
        """What an answer says of the labels."""
        return LabelsInfo(
            name=self.name,
            digest=_digest(self.vectors_key, self.head),
            count=len(self.words),
            head=self.head,
        )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def inline_label_set(words: tuple[str, ...], *, head: Head) -> LabelSet:
    """The labels of one request, taken as they are."""
    return LabelSet(name=None, words=words, head=head)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: LabelSetName
    labels: list[Label] = Field(min_length=1, max_length=MAX_FILE_LABELS)
    templates: list[str] = Field(default=["{}"], min_length=1, max_length=200)
    head: Head = "softmax"
    description: str = ""

    @field_validator("templates")
    @classmethod
    def _has_place(cls, templates: list[str]) -> list[str]:
        if any(template.count("{}") != 1 for template in templates):
            raise ValueError("expected exactly one {} in every template")
        return templates

    @field_validator("labels")
    @classmethod
    def _once(cls, labels: list[str]) -> list[str]:
        if twice := sorted(word for word, times in Counter(labels).items() if times > 1):
            raise ValueError(f"expected every label once, got {', '.join(twice[:5])} again")
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


class LabelBank:
    """Label sets and their vectors.

    Args:
        encode_texts: (m texts) → float32 (m, d) unit vectors; called on the thread that calls `vectors`.
        max_cached: label sets whose vectors are kept; the least recently used one goes first.
    """

    def __init__(
        self,
        *,
        sets: Mapping[str, LabelSet],
        default: str,
        encode_texts: Callable[[Sequence[str]], NDArray[np.float32]],
        max_cached: int,
        inline_head: Head = "softmax",
    ) -> None:
        self._sets = dict(sets)
        self._default = default
        self._encode_texts = encode_texts
        self._max_cached = max_cached
        self._inline_head = inline_head
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def resolve(self, labels: str | tuple[str, ...] | None, head: Head | None = None) -> LabelSet:
        """The labels that a request means. Thread-safe.

        Raises:
            Rejected: unknown_label_set.
        """
        if isinstance(labels, tuple):
            return inline_label_set(labels, head=head or self._inline_head)
        name = labels or self._default
        found = self._sets.get(name)
        if found is None:
            known = ", ".join(sorted(self._sets))
            raise Rejected(
                ErrorCode.UNKNOWN_LABEL_SET,
                f"labels: expected one of {known}, got {name!r}",
                stage=Stage.CLAIM,
            )
        if head is None or head == found.head:
            return found
        return LabelSet(found.name, found.words, found.templates, head)

    def vectors(self, label_set: LabelSet) -> NDArray[np.float32]:
        """Unit vectors (m, d) of the words: templates averaged, then renormalised. One thread only.

        Averaging over templates is the zero-shot recipe of CLIP (Radford et al. 2021, section 3.1.4).
        """
        key = label_set.vectors_key
        if key in self._vectors:
            self._vectors.move_to_end(key)
            return self._vectors[key]
        total: Any = 0.0
        for template in label_set.templates:
            total = total + self._encode_texts([template.replace("{}", word) for word in label_set.words])
        vectors = np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True), dtype=np.float32)
        self._vectors[key] = vectors
        while len(self._vectors) > self._max_cached:
            self._vectors.popitem(last=False)
        return vectors
