"""`shiwu-worker labels diff`: what another label set changes on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shiwu_worker.commands.difference_tables import differences_as_json, print_differences
from shiwu_worker.commands.folder_images import ImageSource, load_images
from shiwu_worker.commands.loaded_labels import Loaded, run_command
from shiwu_worker.commands.rule_tables import label_cosines, tags_of
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.tag_differences import TagDifferences
from shiwu_worker.stages.score.label_files import load_label_set

if TYPE_CHECKING:
    from shiwu.contract import Tag
    from shiwu_worker.jobs.label_set import LabelSet


def run_diff(old: str, new: str, source: ImageSource, *, top_k: int, as_json: bool) -> int:
    """Compare two label sets, print what differs, and return the exit code."""
    return run_command(lambda: _diff(old, new, source, top_k=top_k, as_json=as_json))


def _diff(old: str, new: str, source: ImageSource, *, top_k: int, as_json: bool) -> int:
    loaded, read = load_images([name for name in (old, new) if not _is_file(name)], source)
    before, after = (_tags(loaded, _label_set(loaded, name), read.vectors, top_k=top_k) for name in (old, new))
    found = TagDifferences()
    for answer, one, other in zip(read.answers, before, after, strict=True):
        reference = "" if answer.image is None or source.folder is not None else answer.image.reference
        found.add(reference or answer.id, one, other)
    if as_json:
        click.echo(json.dumps(differences_as_json(found), ensure_ascii=False, indent=2))
    else:
        print_differences(found)
    return 0


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in {".yaml", ".yml"}


def _label_set(loaded: Loaded, name: str) -> LabelSet:
    """The set of a file, or the one of this name.

    Raises:
        FatalError: with ExitCode.CONFIG, when the file is wrong.
    """
    if not _is_file(name):
        return loaded.sets[name]
    try:
        return load_label_set(Path(name))
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error


def _tags(loaded: Loaded, label_set: LabelSet, vectors: Any, *, top_k: int) -> list[tuple[Tag, ...]]:
    encoded = loaded.encode(label_set)
    return tags_of(label_cosines(vectors, encoded), encoded, scale=loaded.scale, bias=loaded.bias, top_k=top_k)
