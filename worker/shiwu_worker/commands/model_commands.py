"""`shiwu-worker --fetch-model` and `--convert`: write a checkpoint into a folder and check it with the loading code."""

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
from shiwu_worker.checkpoints.model_files import content_revision, is_embedded, model_folder, split_hub_id
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.decode.image_spec import read_image_spec

COMPLETE_FILE: Final = ".whole"
"""File with `id@revision` in a complete folder. The first version of the chart wrote the revision only."""
READABLE_BY_ALL: Final = 0o644
DOCUMENTS: Final = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def run_fetch(target: Path) -> int:
    """Download SHIWU_MODEL into this folder unless the folder is complete; return the exit code."""
    settings = load_settings_or_exit()
    return _run(lambda: fetch_model(settings.model, target))


def run_convert(target: Path) -> int:
    """Write SHIWU_MODEL into a new folder with its weights as safetensors; return the exit code."""
    settings = load_settings_or_exit()
    return _run(lambda: convert_model(settings.model, target))


def _run(command: Callable[[], str]) -> int:
    """Run a command, print its result or its error, and return the exit code."""
    try:
        click.echo(command())
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    return 0


def fetch_model(model: str | None, target: Path) -> str:
    """Download a model of the hub into a folder and check it as the worker does; return a line for the operator.

    Raises:
        FatalError: the setting is no hub id, the download fails, the folder cannot be written, or the worker could not
            load its checkpoint.
    """
    if model is None or is_embedded(model) or Path(model).is_dir() or model.startswith((".", "/", "~")):
        given = repr(model) if model else "none"
        raise FatalError(ExitCode.CONFIG, f"SHIWU_MODEL: expected a hub id to download, got {given}")
    hub_id, revision = split_hub_id(model)
    wanted = f"{hub_id}@{revision or 'main'}"
    complete_file = target / COMPLETE_FILE
    if _is_complete(complete_file, wanted):
        try:
            return f"{target} is complete already: {_check_folder(target)}"
        except WrongCheckpoint as error:
            click.echo(f"downloading again: {error}", err=True)
    if hub.is_offline():
        raise WrongCheckpoint(f"SHIWU_MODEL: {model!r} needs a download, and HF_HUB_OFFLINE forbids it; set it to 0")
    try:
        target.mkdir(parents=True, exist_ok=True)
        complete_file.unlink(missing_ok=True)
        hub.download(hub_id, revision, into=target)
        summary = _check_folder(target)
        shutil.rmtree(target / ".cache", ignore_errors=True)
        complete_file.write_text(wanted, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(target, error) from error
    return f"{target} is complete: {summary}"


def _is_complete(complete_file: Path, wanted: str) -> bool:
    try:
        return complete_file.read_text(encoding="utf-8").strip() in {wanted, wanted.partition("@")[2]}
    except (OSError, UnicodeDecodeError):
        return False


def _check_folder(folder: Path) -> str:
    """Check a folder as far as possible without loading its weights; return a summary."""
    from shiwu_worker.stages.encode.checkpoint import open_tokenizer, vocabulary_size  # noqa: PLC0415 torch takes seconds to import

    if (folder / ADAPTER_CONFIG).exists():
        raise WrongCheckpoint(f"{folder}: this is an adapter without its base model; merge both with --convert")
    checkpoint = read_checkpoint(folder)
    spec = read_image_spec(folder)
    open_tokenizer(checkpoint, vocab_size=vocabulary_size(checkpoint))
    return f"{_size(checkpoint)}, images of {spec.width}×{spec.height}, revision {content_revision(checkpoint)}"


def convert_model(model: str | None, target: Path) -> str:
    """Write the checkpoint into a new folder as safetensors, with its adapter merged; return a line for the operator.

    Both checkpoints are loaded and all weights compared before the folder gets its name.

    Raises:
        FatalError: the model cannot be loaded, the folder is not empty, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FatalError(ExitCode.CONFIG, f"--convert: expected a new or an empty folder, got {target}")
    source = read_checkpoint(model_folder(model))
    read_image_spec(source.folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete, so that no worker finds an incomplete folder.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            part = Path(name) / "model"
            part.mkdir()
            _write(source, part)
            _compare(source, read_checkpoint(part))
            os.replace(part, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    copy = read_checkpoint(target)
    return f"{target} is written: {_size(copy)}, the same weights as {source.folder}, revision {content_revision(copy)}"


def _write(source: Checkpoint, part: Path) -> None:
    """Write the weights and all other files of the checkpoint. Converted weights keep their number format."""
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
            # Copies, because safetensors refuses tensors that share memory.
            tensors |= {
                name: tensor.clone().contiguous() for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)
            }
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
    for path in (source.config, *source.tokenizer_files, *source.processor_files):
        if not (part / path.name).exists():
            shutil.copyfile(path, part / path.name)
    for name in DOCUMENTS:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, part / name)
    for path in part.iterdir():
        # safetensors writes files that only their owner may read; a worker often runs as another user.
        path.chmod(READABLE_BY_ALL)


def _compare(source: Checkpoint, copy: Checkpoint) -> None:
    """Load both as the worker does, and compare all weights."""
    import torch  # noqa: PLC0415 as above

    from shiwu_worker.stages.encode.checkpoint import load_model  # noqa: PLC0415 as above

    read_image_spec(copy.folder)
    before, after = load_model(source).state_dict(), load_model(copy).state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise FatalError(ExitCode.INTERNAL, f"expected the same weights after the conversion of {source.folder}")


def _size(checkpoint: Checkpoint) -> str:
    megabytes = sum(path.stat().st_size for path in checkpoint.files) / 1e6
    return f"{len(checkpoint.files)} files, {megabytes:.1f} MB"


def _cannot_write(target: Path, error: OSError) -> FatalError:
    return FatalError(ExitCode.CONFIG, f"{target}: cannot be written ({error.strerror or error})")
