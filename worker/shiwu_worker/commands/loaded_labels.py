"""What the commands for label sets share: the sets with their vectors, errors as exit codes, and files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
import yaml

from shiwu_worker.calibration import CalibrationError
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.commands.answer_vectors import WrongAnswers
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.errors import ExitCode, FatalError, WrongVectors
from shiwu_worker.service.labels import load_label_bank, read_label_sets
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu.contract import ModelInfo
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels
    from shiwu_worker.stages.encode.encoder import Encoder

NOT_KEPT: Final = 1
"""Exit code of findings, and of limits that do not hold."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The label sets of this worker with their vectors."""

    sets: Mapping[str, LabelSet]
    encode: Callable[[LabelSet], EncodedLabels]
    encode_images: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """Pixels uint8 (n, h, w, 3) → unit vectors float32 (n, d)."""
    model: ModelInfo
    scale: float
    bias: float | None


def run_command(command: Callable[[], int]) -> int:
    """Run a command, print its error if it has one, and return the exit code."""
    try:
        return command()
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    except WrongAnswers as error:
        click.echo(f"CONFIG: {error}", err=True)
        return int(ExitCode.CONFIG)
    except CalibrationError as error:
        click.echo(f"not calibrated: {error}", err=True)
        return NOT_KEPT


def load(names: Sequence[str], *, has_calibrations: bool = True) -> Loaded:
    """Load the model, and check that these sets exist.

    Args:
        has_calibrations: whether calibration files are read.

    Raises:
        FatalError: a set is unknown, or the worker could not start with this model and these label files.
    """
    settings = load_settings_or_exit()
    sets = read_label_sets(settings, has_calibrations=has_calibrations)
    for name in names:
        if name not in sets:
            text = f"expected the name of a label set, one of {', '.join(sorted(sets))}, got {name!r}"
            raise FatalError(ExitCode.CONFIG, text)
    with redirect_stdout(sys.stderr):
        folder = model_folder(settings.model)
        encoder = load_encoder(settings, folder, read_image_spec(folder))
    bank = load_label_bank(settings, encoder, sets)
    encode_images = partial(_encode_images, encoder)
    return Loaded(sets, bank.encoded, encode_images, encoder.info, encoder.scale, encoder.bias)


def _encode_images(encoder: Encoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    size = encoder.batch_sizes[-1]
    starts = range(0, len(pixels), size)
    return np.concatenate([_encode_batch(encoder, pixels[start : start + size]) for start in starts])


def _encode_batch(encoder: Encoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        return encoder.encode(pixels)
    except WrongVectors:  # an image that overflows a small number format
        return encoder.encode_exact(pixels)


def first_version(label_set: LabelSet) -> LabelSet:
    """The set, if it is of version 1.

    Raises:
        FatalError: with ExitCode.CONFIG, for another one.
    """
    if label_set.rules is not None:
        raise FatalError(ExitCode.CONFIG, f"expected a label set of version 1, got {label_set.name} of version 2")
    return label_set


def as_yaml(fields: Mapping[str, Any]) -> str:
    """The text of a label file."""
    return yaml.safe_dump(dict(fields), allow_unicode=True, sort_keys=False, width=120)


def write_file(output: Path, text: str) -> None:
    """Write the file whole or not at all.

    Raises:
        FatalError: with ExitCode.CONFIG, when it cannot be written.
    """
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.chmod(0o644)  # a worker often runs as another user
        part.replace(output)
    except OSError as error:
        raise FatalError(ExitCode.CONFIG, f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            part.unlink()
