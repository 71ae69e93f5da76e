"""Finds the files of a checkpoint that the worker loads, and rejects checkpoints that are incomplete or unsupported.

Reads configurations and the headers of weight files, never the weights, and loads neither torch nor transformers.
docs/models.md describes the layouts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from shiwu_worker.checkpoints.weight_files import WrongFile, check_safetensors, check_torch_file, check_whole
from shiwu_worker.errors import ExitCode, FatalError

CONFIG: Final = "config.json"
PROCESSOR_CONFIGS: Final = ("processor_config.json", "preprocessor_config.json")
WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files in the order in which transformers searches them; the first that exists is loaded."""
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
VOCABULARIES: Final = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tokenizer.model",),
)
"""Each of these sets of files is a complete vocabulary."""
TOKENIZER_FILES: Final = (
    *(name for names in VOCABULARIES for name in names),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SMALL_FILES: Final = (
    CONFIG,
    *PROCESSOR_CONFIGS,
    *TOKENIZER_FILES,
    ADAPTER_CONFIG,
    *(name for name in WEIGHTS if name.endswith(".json")),
)
"""Every file that may be part of a checkpoint, without the weights."""


class WrongCheckpoint(FatalError):
    """The checkpoint cannot be used; the text names the file and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitCode.MODEL, message)


class IncompleteCheckpoint(WrongCheckpoint):
    """A file is missing or cut off, so a download may help."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files that are loaded. Each of them exists and is not visibly cut off."""

    folder: Path
    """The folder that SHIWU_MODEL names, or the download."""
    base: Path
    """The folder with config.json and the weights: the same as `folder`, except for an adapter."""
    weights: tuple[Path, ...]
    index: Path | None
    """The file that maps tensors to weight files; None if there is only one."""
    tokenizer: Path
    """The folder with the tokenizer: the folder of an adapter if it has a vocabulary, otherwise `base`."""
    tokenizer_files: tuple[Path, ...]
    processor_files: tuple[Path, ...]
    adapter: tuple[Path, ...] = ()
    """adapter_config.json and the weights of the adapter; empty if there is no adapter."""

    @property
    def config(self) -> Path:
        """The model's config.json."""
        return self.base / CONFIG

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are safetensors, and not pytorch_model.bin."""
        return self.weights[0].suffix == ".safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that influence the results of the model."""
        index = (self.index,) if self.index else ()
        return (self.config, *index, *self.weights, *self.adapter, *self.tokenizer_files, *self.processor_files)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Find the files of the checkpoint in this folder. The base of an adapter is searched on this machine only.

    Raises:
        IncompleteCheckpoint: when a file is missing or cut off.
        WrongCheckpoint: when the checkpoint needs something that the worker does not support.
    """
    try:
        adapter = [name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if (folder / name).exists()]
        full = [name for name in WEIGHTS if (folder / name).exists()]
        if adapter and full:
            raise WrongCheckpoint(
                f"{folder}: expected full weights or an adapter, got both {full[0]} and {adapter[0]}, and cannot tell "
                "whether the weights hold the adapter already; move the adapter's files into a folder of their own, "
                "or remove them"
            )
        return _read_adapter(folder) if adapter else _read_full(folder)
    except WrongFile as error:
        raise IncompleteCheckpoint(str(error)) from error
    except OSError as error:
        raise WrongCheckpoint(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        IncompleteCheckpoint: when it is no JSON object, or a pointer of git-lfs.
    """
    try:
        check_whole(path)
        found = json.loads(path.read_bytes())
    except WrongFile as error:
        raise IncompleteCheckpoint(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise IncompleteCheckpoint(f"{path}: expected JSON ({error!s:.100}); download the file again") from error
    if not isinstance(found, dict):
        raise IncompleteCheckpoint(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def weights_to_fetch(names: Iterable[str], index_folder: Path) -> tuple[str, ...]:
    """The weight files to download, out of the files of a repository; empty if it has none.

    Args:
        index_folder: the folder with the index files of the repository, which name weights in several parts.
    """
    available = set(names)
    for name in WEIGHTS:
        if name in available:
            return _shard_names(index_folder / name) if name.endswith(".json") else (name,)
    return ()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, a folder or a hub id, and its revision."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name.strip():
        raise WrongCheckpoint(f"{path}: expected base_model_name_or_path with a folder or a hub id, got {name!r}")
    return name, revision if isinstance(revision, str) and revision else None


def _read_full(folder: Path) -> Checkpoint:
    """Read a folder that has its own weights."""
    if not (folder / CONFIG).is_file():
        raise IncompleteCheckpoint(f"{folder}: expected a checkpoint with config.json, found {_listed(folder)}")
    _check_config(read_json(folder / CONFIG), folder / CONFIG)
    index, weights = _weights(folder)
    tokenizer_files = _tokenizer_files(folder)
    if not tokenizer_files:
        raise IncompleteCheckpoint(_no_tokenizer(folder))
    processors = tuple(path for name in PROCESSOR_CONFIGS if (path := folder / name).is_file())
    _check_code([*tokenizer_files, *processors])
    return Checkpoint(
        folder=folder,
        base=folder,
        weights=weights,
        index=index,
        tokenizer=folder,
        tokenizer_files=tokenizer_files,
        processor_files=processors,
    )


def _read_adapter(folder: Path) -> Checkpoint:
    """Read the folder of an adapter, and the base that its configuration names."""
    weights = next((path for name in ADAPTER_WEIGHTS if (path := folder / name).is_file()), None)
    if weights is None or not (folder / ADAPTER_CONFIG).is_file():
        whole = f"{ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}"
        raise IncompleteCheckpoint(f"{folder}: expected an adapter's {whole}, found {_listed(folder)}")
    _check_weights(weights)
    if find_spec("peft") is None:
        raise WrongCheckpoint(
            f"{folder}: an adapter needs the package peft in the worker's environment (pip install peft); or merge it "
            "once where peft is installed, with shiwu-worker --convert"
        )
    _check_adapter_config(folder / ADAPTER_CONFIG)
    name, revision = adapter_base(folder)
    base_folder = Path(name) if os.path.isdir(name) else cached_snapshot(name, revision)
    if base_folder is None:
        raise IncompleteCheckpoint(
            f"{folder / ADAPTER_CONFIG}: its base model {name!r} is neither a folder here nor in the hub's cache; "
            "write the folder of the base into base_model_name_or_path"
        )
    if (base_folder / ADAPTER_CONFIG).exists():
        raise WrongCheckpoint(f"{folder}: expected full weights in its base {base_folder}, got an adapter; merge it")
    base = _read_full(base_folder)
    tokenizer_files = _tokenizer_files(folder)
    processors = tuple(path for file in PROCESSOR_CONFIGS if (path := folder / file).is_file())
    _check_code([*tokenizer_files, *processors])
    return Checkpoint(
        folder=folder,
        base=base.base,
        weights=base.weights,
        index=base.index,
        tokenizer=folder if tokenizer_files else base.tokenizer,
        tokenizer_files=tokenizer_files or base.tokenizer_files,
        processor_files=processors or base.processor_files,
        adapter=(folder / ADAPTER_CONFIG, weights),
    )


def cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a model in the hub's cache on this machine; it may lack files."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 not needed for a folder
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 not needed for a folder

    for file in (CONFIG, ADAPTER_CONFIG):
        try:
            cached = try_to_load_from_cache(hub_id, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


# ------------------------------------------------------------------------------------ weights
def _weights(folder: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """The index, if there is one, and the weight files."""
    first = next((path for name in WEIGHTS if (path := folder / name).exists()), None)
    if first is None:
        raise IncompleteCheckpoint(
            f"{folder}: expected weights in model.safetensors or pytorch_model.bin, or in parts with an index file, "
            f"found {_listed(folder)}"
        )
    if first.suffix != ".json":
        _check_weights(first)
        return None, (first,)
    shards = tuple(folder / name for name in _shard_names(first))
    for path in shards:
        if not path.is_file():
            raise IncompleteCheckpoint(f"{path}: missing, although {first.name} names it; download it")
        _check_weights(path)
    return first, shards


def _check_weights(path: Path) -> None:
    (check_safetensors if path.suffix == ".safetensors" else check_torch_file)(path)


def _shard_names(index: Path) -> tuple[str, ...]:
    """The files that an index names; they must be plain names of files in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IncompleteCheckpoint(f"{index}: expected weight_map with the file of each tensor")
    suffix = ".safetensors" if index.name.startswith("model.") else ".bin"
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(suffix):
            raise WrongCheckpoint(f"{index}: expected plain names of *{suffix} files in this folder, got {name!r:.100}")
    return tuple(names)


# ------------------------------------------------------------------------------------ the tokenizer
def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """All files of the tokenizer; empty if the folder has no complete vocabulary."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        return ()
    found = tuple(path for name in TOKENIZER_FILES if (path := folder / name).is_file())
    for path in found:
        check_whole(path)
    return found


def _no_tokenizer(folder: Path) -> str:
    whole = ", ".join(" with ".join(names) for names in VOCABULARIES)
    return (
        f"{folder}: expected the tokenizer's vocabulary (one of {whole}), found {_listed(folder)}; without it every "
        "label would be unknown, so download the tokenizer's files of the same model"
    )


# ------------------------------------------------------------------------------------ what is not supported
def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Reject settings of config.json that would be ignored, or would run code that comes with the weights."""
    if not isinstance(config.get("model_type"), str):
        raise WrongCheckpoint(f"{path}: expected model_type with a model of transformers, got none")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        _check_auto_map(part, path)
        if part.get("quantization_config"):
            method = part["quantization_config"]
            name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
            raise WrongCheckpoint(
                f"{path}: quantization_config ({name!s:.40}) is not supported; use the weights as they were before "
                "quantization, and SHIWU_DTYPE for a smaller format"
            )
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise WrongCheckpoint(f"{path}: {key} {value!r:.60} would load code from a hub; remove the line")
    if config.get("transformers_weights"):
        raise WrongCheckpoint(
            f"{path}: transformers_weights is not supported; call the file model.safetensors and remove the line"
        )


def _check_code(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.name.endswith("_config.json"):
            config = read_json(path)
            for part in (config, *(part for part in config.values() if isinstance(part, dict))):
                _check_auto_map(part, path)
            _check_file_names(config, path)


def _check_auto_map(config: Mapping[str, Any], path: Path) -> None:
    if config.get("auto_map"):
        raise WrongCheckpoint(
            f"{path}: auto_map names Python code that comes with the checkpoint, and the worker runs no such code; "
            "use a model that transformers knows by itself"
        )


def _check_file_names(config: Mapping[str, Any], path: Path) -> None:
    """Reject a tokenizer's configuration that names files elsewhere, which some versions of transformers read.

    A path that exists nowhere is one of the machine that saved the tokenizer; it has no effect.
    """
    if config.get("init_inputs"):
        raise WrongCheckpoint(f"{path}: init_inputs would name the tokenizer's files; remove the line")
    listed = config.get("fast_tokenizer_files")
    names = [("fast_tokenizer_files", str(name)) for name in listed] if isinstance(listed, list) else []
    names += [(key, value) for key, value in config.items() if key.endswith("_file") and isinstance(value, str)]
    for key, name in names:
        if name != os.path.basename(name) and ((path.parent / name).exists() or os.path.exists(name)):
            raise WrongCheckpoint(f"{path}: {key}: expected the name of a file in this folder, got {name!r:.100}")


def _check_adapter_config(path: Path) -> None:
    """Reject settings of an adapter for which peft imports a module that the adapter names."""
    if read_json(path).get("megatron_config"):
        text = "megatron_config would import code that the adapter names"
        raise WrongCheckpoint(f"{path}: {text}; merge the adapter where it was trained, and name that folder")


def _listed(folder: Path) -> str:
    """The names of the files in a folder, for an error text."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
