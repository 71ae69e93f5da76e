"""Finds the model that SHIWU_MODEL names: embedded in the package, in a folder, or on a hub. Never loads torch."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from shiwu_worker.checkpoints import hub
from shiwu_worker.checkpoints.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    Checkpoint,
    IncompleteCheckpoint,
    WrongCheckpoint,
    adapter_base,
    cached_snapshot,
    read_checkpoint,
)

EMBEDDED: Final = "photo-zh"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def split_hub_id(model: str) -> tuple[str, str | None]:
    """`ID@REVISION` → id and revision, which is None for the main branch."""
    hub_id, _, revision = model.partition("@")
    return hub_id, revision or None


def is_embedded(model: str | None) -> bool:
    """Whether this is the embedded model: none is named, or it is by its name in answers, and no folder has that."""
    return model is None or (model == EMBEDDED and not os.path.isdir(model))


def model_name(model: str | None) -> str:
    """The name of the model in answers: the hub id without its revision, the folder's name, or `photo-zh`."""
    if model is None or is_embedded(model):
        return EMBEDDED
    return Path(model).resolve().name if os.path.isdir(model) else split_hub_id(model)[0]


def model_folder(model: str | None) -> Path:
    """The folder to load from, with checked files; a model of a hub is downloaded unless it is in the hub's cache.

    Args:
        model: a folder, a hub id, or `ID@REVISION`; None and `photo-zh` are the embedded model.

    Raises:
        WrongCheckpoint: with ExitCode.MODEL, when there is no such folder or hub id, the hub cannot be reached, or the
            checkpoint is incomplete or not supported.
    """
    if model is None or is_embedded(model):
        return Path(__file__).parents[1] / "data/photo_zh"
    folder = _own_folder(model)
    if folder is None:
        return _hub_folder(model)
    _fetch_base(folder)
    read_checkpoint(folder)
    return folder


def model_revision(folder: Path) -> str:
    """The commit if the folder is a snapshot of a hub, otherwise 12 hex digits over all files that are loaded."""
    if _COMMIT.fullmatch(folder.name) and not (folder / ADAPTER_CONFIG).exists():
        return folder.name
    return content_revision(read_checkpoint(folder))


def content_revision(checkpoint: Checkpoint) -> str:
    """12 hex digits that change with the name or content of any file that is loaded."""
    digest = hashlib.sha256()
    for path in checkpoint.files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _own_folder(model: str) -> Path | None:
    """The folder that the setting names; None if it can only be a hub id."""
    path = Path(model)
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise WrongCheckpoint(
                f"SHIWU_MODEL: expected a folder or a hub id, got the file {model!r}; name its folder"
            )
    except OSError as error:
        text = (
            f"SHIWU_MODEL: the folder {model!r} cannot be read ({error.strerror or error}); give the worker the right"
        )
        raise WrongCheckpoint(text) from error
    if model.startswith((".", "/", "~")):
        raise WrongCheckpoint(f"SHIWU_MODEL: expected a folder or a hub id, got {model!r}: no such folder")
    return None


def _hub_folder(model: str) -> Path:
    """The folder of a hub's model in the cache; files that are missing are downloaded."""
    hub_id, revision = split_hub_id(model)
    cached = cached_snapshot(hub_id, revision)
    if cached is not None:
        try:
            read_checkpoint(cached)
        except IncompleteCheckpoint as error:
            # Another program may have left only some files of this model in the cache.
            if hub.is_offline():
                text = f"SHIWU_MODEL: {model!r} is incomplete in the hub's cache, and HF_HUB_OFFLINE is set: {error}"
                raise WrongCheckpoint(text) from error
        else:
            return cached
    if hub.is_offline():
        raise WrongCheckpoint(
            f"SHIWU_MODEL: expected a folder or a hub id that can be loaded, got {model!r}: no such folder, not in the "
            f"hub's cache ({hub.cache_folder()}), and HF_HUB_OFFLINE is set; unset it for one start, or name a folder"
        )
    folder = hub.download(hub_id, revision)
    _fetch_base(folder)
    try:
        read_checkpoint(folder)
    except IncompleteCheckpoint as error:
        # Files in the cache are not downloaded again, even if they are damaged.
        text = f"SHIWU_MODEL: {model!r} is incomplete: {error}. If {hub.endpoint()} has it whole, remove the copy here"
        raise WrongCheckpoint(f"{text}, {folder.parent.parent}, and start again") from error
    return folder


def _fetch_base(folder: Path) -> None:
    """Download the base that an adapter names, unless it is a folder or complete in the cache."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    name, revision = adapter_base(folder)
    if os.path.isdir(name) or os.path.isabs(name) or hub.is_offline():
        return
    cached = cached_snapshot(name, revision)
    try:
        if cached is not None and (cached / CONFIG).exists():
            read_checkpoint(cached)
            return
    except IncompleteCheckpoint:
        pass
    hub.download(name, revision)
