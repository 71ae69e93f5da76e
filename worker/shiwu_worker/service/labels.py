"""Label sets of a worker: reads their files, makes the label bank, and refuses labels that the model cannot use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from shiwu.contract import WarningCode
from shiwu_worker.checkpoints import model_files
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels
    from shiwu_worker.stages.encode.encoder import Encoder

log: FilteringBoundLogger = structlog.get_logger()
EMBEDDED_MODEL: Final = (
    "the embedded model knows some 1,000 kinds of things, and few people, plants and sceneries; set SHIWU_MODEL for a "
    "larger model"
)
OWN_LABEL_SETS: Final = Path(__file__).parents[1] / "data/label_sets"


def read_label_sets(settings: Settings, *, has_calibrations: bool = True) -> dict[str, LabelSet]:
    """Read the label sets of the package and of the operator from their files. Needs no model.

    Args:
        has_calibrations: whether calibration files are read; without them a set cannot decide by z.

    Raises:
        FatalError: with ExitCode.CONFIG when a file is wrong, or a set that a setting names is missing.
    """
    if settings.labels_dir is not None and not os.path.isdir(settings.labels_dir):
        text = f"SHIWU_LABELS_DIR: expected a folder of label sets, got {settings.labels_dir}"
        raise FatalError(ExitCode.CONFIG, text)
    folders = [OWN_LABEL_SETS, *([settings.labels_dir] if settings.labels_dir else [])]
    try:
        sets = load_label_sets(folders, has_calibrations=has_calibrations)
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error
    if settings.default_labels not in sets:
        known = ", ".join(sorted(sets))
        raise FatalError(
            ExitCode.CONFIG, f"SHIWU_DEFAULT_LABELS: expected one of {known}, got {settings.default_labels!r}"
        )
    for field in ("shadow", "shadow_of"):
        name = getattr(settings, field)
        if name is not None and name not in sets:
            text = f"SHIWU_{field.upper()}: expected one of {', '.join(sorted(sets))}, got {name!r}"
            raise FatalError(ExitCode.CONFIG, text)
    return sets


def open_label_bank(settings: Settings, encoder: Encoder, sets: Mapping[str, LabelSet]) -> LabelBank:
    """Make the label bank with the vectors of the default labels; log where the embedded model is used.

    Raises:
        FatalError: with ExitCode.CONFIG or ExitCode.MODEL when label set and model do not suit each other.
    """
    bank = load_label_bank(settings, encoder, sets)
    encode_default_labels(bank)
    if is_embedded(settings, encoder):
        log.info("embedded_model", meaning=EMBEDDED_MODEL)
    return bank


def is_embedded(settings: Settings, encoder: Encoder) -> bool:
    """Whether the worker runs the embedded model."""
    return model_files.is_embedded(settings.model) and encoder.info.id == model_files.EMBEDDED


def load_label_bank(settings: Settings, encoder: Encoder, sets: Mapping[str, LabelSet]) -> LabelBank:
    """Make the label bank of these label sets for this model.

    Raises:
        FatalError: with ExitCode.CONFIG when a set does not suit the model.
    """
    try:
        return LabelBank(
            sets=sets,
            default=settings.default_labels,
            encode_texts=encoder.encode_texts,
            label_tokens=encoder.label_tokens,
            max_cached=settings.label_cache,
            max_bytes=settings.label_cache_mb << 20,
            max_tokens=encoder.text_tokens,
            has_bias=encoder.bias is not None,
            inline_head=encoder.default_head,
            revision=encoder.info.revision,
        )
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error


def encode_default_labels(bank: LabelBank) -> None:
    """Compute the vectors of the default labels.

    Raises:
        FatalError: with ExitCode.MODEL when the model cannot read some of them or cannot tell them apart.
    """
    check_default_labels(bank.encoded(bank.resolve(None)))


def check_default_labels(encoded: EncodedLabels) -> None:
    """Check that the model can read the default labels and tell them apart.

    Raises:
        FatalError: with ExitCode.MODEL when it cannot.
    """
    codes = {WarningCode.LABELS_UNREADABLE, WarningCode.LABELS_ALIKE}
    wrong = [warning for warning in encoded.warnings if warning.code in codes]
    if wrong:
        reasons = "; ".join(warning.message for warning in wrong)
        raise FatalError(
            ExitCode.MODEL,
            f"SHIWU_DEFAULT_LABELS {encoded.label_set.name}: {reasons}. Check that the tokenizer's files are those of "
            "this model, or name a label set in words that the model knows",
        )
