"""Images for the commands for label sets: answers with vectors, or a folder of images that are encoded here.

Images of a folder are read and decoded with the limits and in the sandbox of a worker.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import click
import numpy as np

from shiwu.broker.chunks import chunks
from shiwu.contract import Answer, ImageInfo, Status
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.commands.answer_vectors import AnswerVectors, WrongAnswers, read_vectors
from shiwu_worker.commands.command_loaders import CommandLoaders
from shiwu_worker.commands.loaded_labels import Loaded, load
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.types import FORMAT_ALIASES
from shiwu_worker.loaders.protocol import LoadFailed, LoadTask
from shiwu_worker.stages.decode.image_formats import READABLE
from shiwu_worker.stages.decode.image_spec import read_image_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.config.settings import Settings

SUFFIXES: Final = frozenset(f".{name.lower()}" for name in (*READABLE, *FORMAT_ALIASES))
MAX_IMAGES: Final = 200_000
SLOTS: Final = 64
"""Images that are decoded at a time."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the images of a command are; one of both is set."""

    answers: BinaryIO | None = None
    """Answers with vectors, as JSON lines."""
    folder: Path | None = None
    """A folder of images."""


def load_images(
    names: Sequence[str], source: ImageSource, *, has_calibrations: bool = True
) -> tuple[Loaded, AnswerVectors]:
    """Load the model and these label sets, and the vectors of the images.

    Raises:
        FatalError: a set is unknown, or the worker could not start with this model and these label files.
        WrongAnswers: there is no image with a vector.
    """
    if source.folder is None:
        if source.answers is None:
            raise WrongAnswers("expected answers or a folder of images, got neither")
        loaded = load(names, has_calibrations=has_calibrations)
        return loaded, read_vectors(source.answers, model=loaded.model)
    files = image_files(source.folder)
    settings = load_settings_or_exit()
    loaders = _loaders(settings, source.folder)
    # The loaders start before the model, whose libraries they must not inherit. Their log is no output of the command.
    with redirect_stdout(sys.stderr), loaders.running():
        loaded = load(names, has_calibrations=has_calibrations)
        return loaded, _encode(files, source.folder.resolve(), loaders, loaded)


def image_files(folder: Path) -> list[Path]:
    """The files in this folder and its subfolders with the suffix of an image format, except hidden ones.

    Raises:
        WrongAnswers: there are none, or too many.
    """
    root = folder.resolve()
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not 0 < len(found) <= MAX_IMAGES:
        raise WrongAnswers(f"{folder}: expected 1 to {MAX_IMAGES} images, got {len(found)}")
    return found


def _loaders(settings: Settings, folder: Path) -> CommandLoaders:
    """Loader processes that may read one folder and nothing else."""
    allowed = settings.model_copy(update={"allow_folders": (folder.resolve(),), "deny_folders": ()})
    return CommandLoaders(allowed, read_image_spec(model_folder(settings.model)), slots=SLOTS)


def _load(loaders: CommandLoaders, files: Sequence[Path]) -> tuple[NDArray[np.uint8], list[str | None]]:
    """The pixels (n, h, w, 3) of up to SLOTS files that can be decoded, and for each file its error code or None.

    Raises:
        FatalError: the loader processes cannot be kept running.
    """
    loaders.submit(
        [LoadTask(ticket=slot, slot=slot, image=path.as_uri(), source="file:") for slot, path in enumerate(files)]
    )
    codes: dict[int, str | None] = {}
    while len(codes) < len(files):
        for result in loaders.next_results():
            codes[result.slot] = str(result.error.code) if isinstance(result, LoadFailed) else None
    found = [codes[slot] for slot in range(len(files))]
    return loaders.pixels[[slot for slot, code in enumerate(found) if code is None]], found


def _encode(files: Sequence[Path], root: Path, loaders: CommandLoaders, loaded: Loaded) -> AnswerVectors:
    """The vectors of these files, by their paths in the folder. Prints how many cannot be decoded and are left out."""
    vectors: list[NDArray[np.float32]] = []
    answers: list[Answer] = []
    left_out: Counter[str] = Counter()
    with click.progressbar(length=len(files), label="images", file=sys.stderr) as bar:
        for portion in chunks(files, SLOTS):
            pixels, codes = _load(loaders, portion)
            if len(pixels):
                vectors.append(loaded.encode_images(pixels))
            for path, code in zip(portion, codes, strict=True):
                if code is None:
                    image = ImageInfo(reference=path.as_uri())
                    name = str(path.relative_to(root))
                    answers.append(Answer(name, Status.TAGGED, image=image, model=loaded.model))
                else:
                    left_out[code] += 1
            bar.update(len(portion))
    if left_out:
        reasons = ", ".join(f"{code} {count}" for code, count in left_out.most_common())
        click.echo(f"images left out: {left_out.total()} ({reasons})", err=True)
    if not answers:
        raise WrongAnswers(f"expected images that can be decoded, got none of {len(files)}")
    return AnswerVectors(np.concatenate(vectors), answers, 0)
