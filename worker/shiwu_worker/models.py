"""Where a model lies: embedded in the package, in a folder, or on a hub. Never imports torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from shiwu_worker.errors import ExitCode, FatalError

EMBEDDED: Final = "pictogram-zh"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATTERNS: Final = ("*.json", "*.txt", "*.model", "*.safetensors")


def model_name(model: str | None) -> str:
    """What answers call the model: the hub id, the folder's name, or `pictogram-zh`."""
    if model is None:
        return EMBEDDED
    return Path(model).resolve().name if Path(model).is_dir() else model


def model_folder(model: str | None) -> Path:
    """The folder to load from; a hub id is downloaded unless it is in the hub's cache already.

    Raises:
        FatalError: with ExitCode.MODEL when there is no such folder or hub id, it has no safetensors weights, or the
            hub can't be reached.
    """
    if model is None:
        return Path(__file__).parent / "pictogram_zh"
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")):
        raise FatalError(ExitCode.MODEL, f"SHIWU_MODEL: expected a folder or a hub id, got {model!r}: no such folder")
    # Here and not above: a worker with a local model needs no hub.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        try:
            found = Path(snapshot_download(model, allow_patterns=list(_PATTERNS), local_files_only=True))
        except OSError:
            found = None
        # Another program may have left only a config or a tokenizer of this model in the cache.
        if found is None or not _has_weights(found):
            found = Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
        if not _has_weights(found):
            raise FileNotFoundError(f"no *.safetensors in {found}")
    except (OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error!s:.200}"
        text = f"SHIWU_MODEL: expected a folder or a hub id that can be loaded, got {model!r} ({why})"
        raise FatalError(ExitCode.MODEL, text) from error
    return found


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def model_revision(folder: Path) -> str:
    """The hub's commit where the folder is a snapshot of one, else 12 hex digits over the weights.

    For weights in one file they begin what `sha256sum model.safetensors` prints.
    """
    if _COMMIT.fullmatch(folder.name):
        return folder.name
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(each.digest() for each in digests))
    return whole.hexdigest()[:12]
