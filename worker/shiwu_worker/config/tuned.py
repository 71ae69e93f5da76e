"""The tune file: settings that `--tune` measured, and the check whether they apply to this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from structlog.typing import FilteringBoundLogger

from shiwu_worker.config.settings import Settings
from shiwu_worker.runtime.cpus import cpu_model, usable_cores
from shiwu_worker.runtime.nvidia import driver_version, gpu_models, gpus_are_hidden

log: FilteringBoundLogger = structlog.get_logger()

TUNED_SETTINGS: Final = ("max_batch", "torch_threads", "loaders")


class Tuned(BaseModel):
    """The measured settings, with a key of the machine, model and versions that they are valid for."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: tuple[str, ...]
    max_batch: int
    torch_threads: int
    loaders: int


def key_of(settings: Settings, revision: str) -> tuple[str, ...]:
    """Return everything that the measurement depends on. Does not import torch, because loaders start before it.

    Neither the host's name nor the GPU's UUID is part of it: a pod has new ones at each start. Nor is it part of it by
    which setting a GPU is used: a launcher gives SHIWU_DEVICE=cuda to workers of a machine that has `auto`.
    """
    gpus = () if gpus_are_hidden() or settings.device == "cpu" else gpu_models()
    driver = (driver_version() or "") if gpus else ""
    device = "cpu" if settings.device == "cpu" or (settings.device == "auto" and not gpus) else "cuda"
    where = (cpu_model(), str(usable_cores()), device, ", ".join(gpus), driver)
    return (
        *where,
        revision,
        settings.dtype,
        str(settings.compile),
        ",".join(settings.fuse),
        version("torch"),
        version("transformers"),
    )


def apply_tuning(settings: Settings, revision: Callable[[], str]) -> Settings:
    """Return the settings with those of the tune file, if it is valid here. Settings of the operator win.

    Args:
        revision: returns the revision of the model; called only if there is a file, because it reads all weights.
    """
    path = settings.tune_file
    if path is None:
        return settings
    try:
        tuned = Tuned.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return settings
    except (OSError, ValidationError) as error:
        log.warning("tune_file_unreadable", path=str(path), kind=type(error).__name__)
        return settings
    if tuned.key != key_of(settings, revision()):
        log.warning(
            "tune_file_mismatch",
            path=str(path),
            meaning="the file is of another machine, model or version; run --tune again",
        )
        return settings
    return settings.model_copy(
        update={name: getattr(tuned, name) for name in TUNED_SETTINGS if not getattr(settings, name)}
    )
