"""`shiwu-worker --fetch-model` and `--convert`: put a checkpoint into a folder, checked by the code that loads it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from shiwu_worker.checkpoints import hub
from shiwu_worker.checkpoints.checkpoint_files import (
    ADAPTER_CONFIG,
    Checkpoint,
    WrongCheckpoint,
    read_checkpoint,
)
from shiwu_worker.checkpoints.model_files import content_revision, model_folder, split_hub_id
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.decode.image_spec import read_image_spec

MARK: Final = ".whole"
"""Holds `id@revision` once the folder is complete. The chart's first version wrote the revision alone."""
READABLE_BY_ALL: Final = 0o644
PAPERS: Final = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def run_fetch(target: Path) -> int:
    """Download SHIWU_MODEL into this folder unless it is complete there already; return the exit code."""
    settings = load_settings_or_exit()
    return _told(lambda: fetch_model(settings.model, target))


def run_convert(target: Path) -> int:
    """Write SHIWU_MODEL into a new folder with its weights as safetensors; return the exit code."""
    settings = load_settings_or_exit()
    return _told(lambda: convert_model(settings.model, target))


def _told(command: Callable[[], str]) -> int:
    """Print what a command did, or why it could not."""
    try:
        click.echo(command())
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    return 0


def fetch_model(model: str | None, target: Path) -> str:
    """Download a hub's model into a folder and check it as the worker does; return what was done.

    Raises:
        FatalError: the setting names no hub id, the hub cannot give it, the folder cannot be written, or what it holds
            then is no checkpoint that the worker can load.
    """
    if model is None or Path(model).is_dir() or model.startswith((".", "/", "~")):
        raise FatalError(ExitCode.CONFIG, f"SHIWU_MODEL: expected a hub id to download, got {model or 'no model'!r}")
    hub_id, revision = split_hub_id(model)
    asked = f"{hub_id}@{revision or 'main'}"
    mark = target / MARK
    if _is_marked(mark, asked):
        try:
            return f"{target} is complete already: {_checked(target)}"
        except WrongCheckpoint as error:
            click.echo(f"downloading again: {error}", err=True)
    if hub.is_offline():
        raise WrongCheckpoint(f"SHIWU_MODEL: {model!r} is to be downloaded, and HF_HUB_OFFLINE is set; set it to 0")
    try:
        target.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        hub.download(hub_id, revision, into=target)
        found = _checked(target)
        shutil.rmtree(target / ".cache", ignore_errors=True)
        mark.write_text(asked, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(target, error) from error
    return f"{target} is complete: {found}"


def _is_marked(mark: Path, asked: str) -> bool:
    try:
        return mark.read_text(encoding="utf-8").strip() in {asked, asked.partition("@")[2]}
    except (OSError, UnicodeDecodeError):
        return False


def _checked(folder: Path) -> str:
    """Check a folder by all that can be known without loading its weights; return a line about it."""
    from shiwu_worker.stages.encode.checkpoint import open_tokenizer, vocabulary_size  # noqa: PLC0415 torch takes seconds to import

    if (folder / ADAPTER_CONFIG).exists():
        raise WrongCheckpoint(f"{folder}: this is an adapter, which needs its base; merge both once with --convert")
    checkpoint = read_checkpoint(folder)
    spec = read_image_spec(folder)
    open_tokenizer(checkpoint, vocab_size=vocabulary_size(checkpoint))
    return f"{_size(checkpoint)}, images of {spec.width}×{spec.height}, revision {content_revision(checkpoint)}"


def convert_model(model: str | None, target: Path) -> str:
    """Write the checkpoint into a new folder with safetensors, an adapter merged; return what was done.

    Both are loaded and every weight is compared before the folder gets its name.

    Raises:
        FatalError: the model cannot be loaded, the folder is not empty, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FatalError(ExitCode.CONFIG, f"--convert: expected a new or an empty folder, got {target}")
    source = read_checkpoint(model_folder(model))
    read_image_spec(source.folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete, so that no worker finds half of it.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            part = Path(name) / "model"
            part.mkdir()
            _write(source, part)
            _compare(source, read_checkpoint(part))
            os.replace(part, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    made = read_checkpoint(target)
    return f"{target} is written: {_size(made)}, the same weights as {source.folder}, revision {content_revision(made)}"


def _write(source: Checkpoint, part: Path) -> None:
    """Weights and all other files of the checkpoint. Converted weights keep their number format."""
    import torch  # noqa: PLC0415 it takes seconds to import
    from safetensors.torch import save_file  # noqa: PLC0415 as above

    from shiwu_worker.stages.encode.checkpoint import load_model, quiet_transformers  # noqa: PLC0415 as above

    if source.adapter:
        with quiet_transformers():
            load_model(source).save_pretrained(part)
    elif source.is_safetensors:
        for path in (*source.weights, *([source.index] if source.index else [])):
            shutil.copyfile(path, part / path.name)
    else:
        tensors: dict[str, Any] = {}
        for path in source.weights:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            # Each tensor gets memory of its own: safetensors writes none that share it.
            tensors |= {name: one.clone().contiguous() for name, one in loaded.items() if isinstance(one, torch.Tensor)}
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
    for path in (source.config, *source.tokenizer_files, *source.processor_files):
        if not (part / path.name).exists():
            shutil.copyfile(path, part / path.name)
    for name in PAPERS:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, part / name)
    for path in part.iterdir():
        # safetensors writes files that their owner alone may read, and a worker often runs as another user.
        path.chmod(READABLE_BY_ALL)


def _compare(source: Checkpoint, made: Checkpoint) -> None:
    """Load both as the worker does and compare every weight."""
    import torch  # noqa: PLC0415 as above

    from shiwu_worker.stages.encode.checkpoint import load_model  # noqa: PLC0415 as above

    read_image_spec(made.folder)
    before, after = load_model(source).state_dict(), load_model(made).state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise FatalError(ExitCode.INTERNAL, f"expected the same weights after the conversion of {source.folder}")


def _size(checkpoint: Checkpoint) -> str:
    megabytes = sum(path.stat().st_size for path in checkpoint.files) / 1e6
    return f"{len(checkpoint.files)} files, {megabytes:.1f} MB"


def _cannot_write(target: Path, error: OSError) -> FatalError:
    return FatalError(ExitCode.CONFIG, f"{target}: cannot be written ({error.strerror or error})")
