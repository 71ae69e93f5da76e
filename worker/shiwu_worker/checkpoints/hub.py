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
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.checkpoints.checkpoint_files import (
    ADAPTER_WEIGHTS,
    SMALL_FILES,
    WrongCheckpoint,
    first_line,
    weights_to_fetch,
)

log: FilteringBoundLogger = structlog.get_logger()
MAX_TRIES: Final = 3
RETRY_PAUSE_S: Final = 2.0


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants  # noqa: PLC0415 a worker with a folder needs no hub

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> str:
    """The folder in which the hub's library stores downloads."""
    from huggingface_hub import constants  # noqa: PLC0415 not needed for a folder

    return str(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The URL of the hub."""
    from huggingface_hub import constants  # noqa: PLC0415 not needed for a folder

    return str(constants.ENDPOINT)


def download(hub_id: str, revision: str | None, *, into: Path | None = None) -> Path:
    """Download the files of a checkpoint that are missing; returns their folder.

    Args:
        revision: a commit, branch or tag; None is the main branch.
        into: the folder to download to; None for the hub's cache.

    Raises:
        WrongCheckpoint: when the hub has no such model, refuses it, or cannot be reached; the text tells what to do.
    """
    began_s = time.monotonic()
    with _explained_errors(hub_id, revision), _progress_on_terminals_only():
        folder, commit = _download_with_retries(hub_id, revision, into)
    log.info("model_downloaded", model=hub_id, revision=commit, after_s=round(time.monotonic() - began_s, 1))
    return folder


def _download_with_retries(hub_id: str, revision: str | None, into: Path | None) -> tuple[Path, str]:
    """Download with retries, because older hub libraries do not resume after a broken connection.

    Files that are complete are not downloaded again.
    """
    for _ in range(MAX_TRIES - 1):
        try:
            return _download(hub_id, revision, into)
        except (OSError, ValueError, WrongCheckpoint):  # an answer of the hub, or an error of this machine
            raise
        except Exception as error:  # noqa: BLE001 border: any error of the HTTP library under the hub's library
            log.warning("model_download_interrupted", model=hub_id, error=first_line(error))
            time.sleep(RETRY_PAUSE_S)  # a start waits for its model anyway, and a signal ends it
    return _download(hub_id, revision, into)


def _download(hub_id: str, revision: str | None, into: Path | None) -> tuple[Path, str]:
    """Download once; returns the folder and the commit."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 not needed for a folder

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
    """Remove files of an earlier revision, because two revisions must not mix in one checkpoint."""
    for path in folder.iterdir():
        is_part = path.name in SMALL_FILES or path.suffix in {".safetensors", ".bin"}
        if is_part and path.name not in names and path.is_file():
            path.unlink()


@contextmanager
def _explained_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub's library into one sentence with the remedy."""
    from huggingface_hub import errors  # noqa: PLC0415 not needed for a folder

    model = f"{hub_id}@{revision}" if revision else hub_id
    hub = endpoint()
    try:
        yield
    except WrongCheckpoint:
        raise
    except errors.HFValidationError as error:
        text = f"expected a folder, ORG/NAME or ORG/NAME@COMMIT, got {model!r}: no such folder, and no hub id"
        raise _wrong(text) from error
    except errors.GatedRepoError as error:
        text = f"{hub} gives {model!r} only to those who accepted its terms; accept them there and set HF_TOKEN"
        raise _wrong(text) from error
    except errors.RevisionNotFoundError as error:
        raise _wrong(f"{hub} has {hub_id!r} but no revision {revision!r}; name a commit, branch or tag") from error
    except errors.RepositoryNotFoundError as error:
        text = f"{hub} has no model {model!r}, or it is private; check the name, and set HF_TOKEN for a private one"
        raise _wrong(text) from error
    except OSError as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise _wrong(
                f"{hub} answered with an error for {model!r} ({first_line(error)}); try again later"
            ) from error
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            raise _unreachable(hub, model, error) from error
        raise _wrong(f"{model!r} cannot be written to {cache_folder()} or its folder ({first_line(error)})") from error
    except Exception as error:  # border: the hub's library passes on any error of its HTTP library
        raise _unreachable(hub, model, error) from error


def _unreachable(hub: str, model: str, error: Exception) -> WrongCheckpoint:
    reason = first_line(error.__cause__ or error)
    return _wrong(
        f"{model!r} is not in the cache ({cache_folder()}), and {hub} cannot be reached ({reason}); set HF_ENDPOINT to "
        "a mirror that can, or download the model elsewhere and name its folder"
    )


def _wrong(text: str) -> WrongCheckpoint:
    return WrongCheckpoint(f"SHIWU_MODEL: {text}")


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Switch off the hub's progress bars in logs; restores the setting of the process afterwards."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415 not needed for a folder
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
