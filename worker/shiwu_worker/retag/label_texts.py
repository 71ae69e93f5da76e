"""Text vectors of label sets, and what else scoring needs of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from shiwu_worker.checkpoints.checkpoint_files import read_checkpoint
from shiwu_worker.checkpoints.model_files import model_folder, model_name, model_revision
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels
from shiwu_worker.retag.options import RetagOptions
from shiwu_worker.retag.vector_parts import Origin
from shiwu_worker.service.labels import read_label_sets
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_set


class Prepared(NamedTuple):
    """Everything that scoring needs. Label sets are not used as keys: their stored hash is that of one process."""

    origin: Origin
    """The model that the vectors must have been made by."""
    scale: float
    bias: float | None
    max_tags_bytes: int
    labels: EncodedLabels
    older: EncodedLabels | None
    """The label set to compare with."""


class Failure(NamedTuple):
    """An error, as a value: exceptions with arguments of their own cannot be sent between processes."""

    code: ExitCode
    message: str


def prepare(options: RetagOptions) -> Prepared | Failure:
    """Run the text tower once over all labels, in FP32 on the CPU, as a worker on a CPU does.

    Raises:
        SystemExit: the settings are wrong, and that is printed.
    """
    settings = load_settings_or_exit()
    try:
        return _prepare(settings.model_copy(update={"model": options.model or settings.model}), options)
    except FatalError as error:
        return Failure(error.exit_code, str(error))
    except ValueError as error:
        return Failure(ExitCode.CONFIG, str(error))


def _prepare(settings: Settings, options: RetagOptions) -> Prepared:
    label_set = _label_set(options.labels, settings, options)
    older_set = None if options.diff is None else _label_set(options.diff, settings, options)
    folder = model_folder(settings.model)
    from shiwu_worker.stages.encode.checkpoint import (  # noqa: PLC0415 torch takes seconds to import; files are read first
        TextEncoder,
        load_model,
        score_head,
    )

    checkpoint = read_checkpoint(folder)
    model = load_model(checkpoint)
    head, texts = score_head(model), TextEncoder(model, checkpoint)

    def encoded(labels: LabelSet) -> EncodedLabels:
        bank = LabelBank(
            sets={str(labels.name): labels},
            default=str(labels.name),
            encode_texts=texts.encode,
            label_tokens=texts.label_tokens,
            max_cached=1,
            max_tokens=texts.max_tokens,
            has_bias=head.bias is not None,
        )
        return bank.encoded(labels)

    return Prepared(
        origin=Origin(model_name(settings.model), model_revision(folder)),
        scale=head.scale,
        bias=head.bias,
        max_tags_bytes=settings.answer_tags_kb * 1024,
        labels=encoded(label_set),
        older=None if older_set is None else encoded(older_set),
    )


def _label_set(name: str, settings: Settings, options: RetagOptions) -> LabelSet:
    """The label set of a file, or the one of this name that a worker would use.

    Raises:
        FatalError: with ExitCode.CONFIG, when there is no such set.
        ValueError: the file is wrong.
    """
    path = Path(name)
    if path.suffix.lower() in {".yaml", ".yml"} or path.is_file():
        found = load_label_set(path)
    else:
        sets = read_label_sets(settings)
        if name not in sets:
            known = ", ".join(sorted(sets))
            raise FatalError(ExitCode.CONFIG, f"expected a YAML file of labels, or one of {known}, got {name!r}")
        found = sets[name]
    return found if options.head is None else replace(found, head=options.head)
