"""The tune file: settings that `--tune` measured on this machine, and whether they still fit it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from shiwu_worker.config.settings import Settings
from shiwu_worker.runtime.cpus import usable_cores

log: Any = structlog.get_logger()

KNOBS: Final = ("max_batch", "torch_threads", "loaders")


class Tuned(BaseModel):
    """What was found, and for what: on another machine, model or torch it says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: tuple[str, ...]
    max_batch: int
    torch_threads: int
    loaders: int


def key_of(settings: Settings, revision: str) -> tuple[str, ...]:
    """All that a tuning depends on. Read without torch: loaders start before it is loaded."""
    cores = str(usable_cores())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    where = (socket.gethostname(), cores, settings.device, visible)
    return (*where, revision, settings.dtype, str(settings.compile), version("torch"), version("transformers"))


def apply_tuning(settings: Settings, revision: Callable[[], str]) -> Settings:
    """The settings with what was tuned, where the operator has not said it, and it is for this machine and model.

    Args:
        revision: of the model; asked for only where there is a file, for it reads all weights.
    """
    path = settings.tune_file
    if path is None or not path.exists():
        return settings
    try:
        tuned = Tuned.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        log.warning("tune_file_unreadable", path=str(path), kind=type(error).__name__)
        return settings
    if tuned.key != key_of(settings, revision()):
        log.warning("tune_file_mismatch", path=str(path), meaning="another machine, model or version; tune again")
        return settings
    return settings.model_copy(update={name: getattr(tuned, name) for name in KNOBS if not getattr(settings, name)})
