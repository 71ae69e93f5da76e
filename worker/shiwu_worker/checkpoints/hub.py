"""Downloads a checkpoint from a hub: only the files that the worker loads. Never loads torch or transformers.

Endpoint, token, cache and time-outs are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import structlog

from shiwu_worker.checkpoints.checkpoint_files import (
    ADAPTER_WEIGHTS,
    SMALL_FILES,
    WrongCheckpoint,
    first_line,
    weights_to_fetch,
)

log: Any = structlog.get_logger()
TRIES: Final = 3
PAUSE_S: Final = 2.0


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants  # noqa: PLC0415 a worker with a folder needs no hub

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> str:
    """Where the hub's library keeps what was downloaded."""
    from huggingface_hub import constants  # noqa: PLC0415 as above

    return str(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The hub that is asked."""
    from huggingface_hub import constants  # noqa: PLC0415 as above

    return str(constants.ENDPOINT)


def download(hub_id: str, revision: str | None, *, into: Path | None = None) -> Path:
    """Download the files of a checkpoint that are not there yet, and return their folder.

    Args:
        revision: a commit, branch or tag; None is the main branch.
        into: a folder to download to, instead of the hub's cache.

    Raises:
        WrongCheckpoint: the hub has no such model, refuses it, or cannot be reached; the text says what to do.
    """
    began_s = time.monotonic()
    with _told(hub_id, revision), _progress_on_terminals_only():
        folder, commit = _download_with_retries(hub_id, revision, into)
    log.info("model_downloaded", model=hub_id, revision=commit, after_s=round(time.monotonic() - began_s, 1))
    return folder


def _download_with_retries(hub_id: str, revision: str | None, into: Path | None) -> tuple[Path, str]:
    """Older hub libraries do not resume by themselves when a connection breaks; what is there already is kept."""
    for _ in range(TRIES - 1):
        try:
            return _download(hub_id, revision, into)
        except (OSError, ValueError, WrongCheckpoint):  # an answer of the hub, or a fault of this machine
            raise
        except Exception as error:  # noqa: BLE001 border: whatever the HTTP library of the hub's library raises
            log.warning("model_download_interrupted", model=hub_id, error=first_line(error))
            time.sleep(PAUSE_S)
    return _download(hub_id, revision, into)


def _download(hub_id: str, revision: str | None, into: Path | None) -> tuple[Path, str]:
    """The folder and the commit."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 as above

    if into is None:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(SMALL_FILES)))
        commit = folder.name
    else:
        commit = str(HfApi().model_info(hub_id, revision=revision).sha)
        snapshot_download(hub_id, revision=commit, allow_patterns=list(SMALL_FILES), local_dir=into)
        folder = into
    names = set(HfApi().list_repo_files(hub_id, revision=commit))
    weights = weights_to_fetch(names, folder) or tuple(name for name in ADAPTER_WEIGHTS if name in names)[:1]
    if weights:
        snapshot_download(hub_id, revision=commit, allow_patterns=list(weights), local_dir=into)
    if into is not None:
        _remove_leftovers(into, names)
    return folder, commit


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove what an earlier revision left: two revisions would make one checkpoint that was never published."""
    for path in folder.iterdir():
        is_part = path.name in SMALL_FILES or path.suffix in {".safetensors", ".bin"}
        if is_part and path.name not in names and path.is_file():
            path.unlink()


@contextmanager
def _told(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into one sentence with the remedy."""
    from huggingface_hub import errors  # noqa: PLC0415 as above

    asked = f"{hub_id}@{revision}" if revision else hub_id
    hub = endpoint()
    try:
        yield
    except WrongCheckpoint:
        raise
    except errors.HFValidationError as error:
        text = f"expected a folder, ORG/NAME or ORG/NAME@COMMIT, got {asked!r}: no such folder, and no hub id"
        raise _wrong(text) from error
    except errors.GatedRepoError as error:
        text = f"{hub} gives {asked!r} only to those who accepted its terms; accept them there and set HF_TOKEN"
        raise _wrong(text) from error
    except errors.RevisionNotFoundError as error:
        raise _wrong(f"{hub} has {hub_id!r} but no revision {revision!r}; name a commit, branch or tag") from error
    except errors.RepositoryNotFoundError as error:
        text = f"{hub} has no model {asked!r}, or it is private; check the name, and set HF_TOKEN for a private one"
        raise _wrong(text) from error
    except OSError as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise _wrong(
                f"{hub} answered with an error for {asked!r} ({first_line(error)}); try again later"
            ) from error
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            raise _unreachable(hub, asked, error) from error
        raise _wrong(f"{asked!r} cannot be written to {cache_folder()} or its folder ({first_line(error)})") from error
    except Exception as error:  # border: the hub's library lets through whatever its HTTP library raises
        raise _unreachable(hub, asked, error) from error


def _unreachable(hub: str, asked: str, error: Exception) -> WrongCheckpoint:
    reason = first_line(error.__cause__ or error)
    return _wrong(
        f"{asked!r} is not in the cache ({cache_folder()}), and {hub} cannot be reached ({reason}); set HF_ENDPOINT to "
        "a mirror that can, or download the model elsewhere and name its folder"
    )


def _wrong(text: str) -> WrongCheckpoint:
    return WrongCheckpoint(f"SHIWU_MODEL: {text}")


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Without the hub's progress bars in a log, and with the process's own setting again afterwards."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415 as above
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
