"""`shiwu-worker model inspect`: what a checkpoint is, whether the worker can use it, and what it answers.

The answer of the worker stands next to that of the reference script: transformers' own AutoModel and AutoProcessor.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from shiwu.contract import Head, printable, printable_lines
from shiwu_worker.checkpoints.checkpoint_files import Checkpoint, first_line, read_checkpoint, read_json
from shiwu_worker.checkpoints.model_files import model_folder, model_name, model_revision
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.config.views import decode_limits
from shiwu_worker.errors import ExitCode, FatalError, Rejected
from shiwu_worker.service.labels import encode_default_labels, load_label_bank, read_label_sets
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.score.scorer import score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.config.settings import Settings
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.stages.encode.encoder import Encoder

T = TypeVar("T")
SAMPLE: Final = Path(__file__).parents[1] / "data/sample.jpg"
"""A photograph of a cat; NOTICE names its author and licence."""
TOP: Final = 5
SCORE_DIGITS: Final = 6
MAX_DIFFERENCE: Final = 0.02
"""Difference of scores up to which both answers count as the same: reduced decoding and the number format cause it."""
SIGLIP2_VOCABULARY: Final = 256_000
"""SigLIP 2 in fixed sizes has the model_type of SigLIP and the vocabulary of Gemma."""
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
FAMILIES: Final = {
    "chinese_clip": "Chinese-CLIP",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "altclip": "AltCLIP",
    "metaclip_2": "MetaCLIP 2",
    "vision-text-dual-encoder": "dual encoder",
}
"""By the model_type of config.json."""


@dataclass(slots=True)
class Tower:
    """The part of a model that reads images or texts, with its projection."""

    parameters: int
    bytes: int
    """In the number format that the worker uses."""


@dataclass(slots=True)
class Answer:
    """The best labels of the image."""

    labels: list[str]
    scores: list[float]


@dataclass(slots=True)
class Inspection:
    """What is known about a model. Fields that an error left unknown are None."""

    model: str
    usable: bool = False
    reason: str | None = None
    """Why the worker cannot use the model."""
    warnings: list[str] = field(default_factory=list)
    family: str | None = None
    revision: str | None = None
    folder: str | None = None
    format: str | None = None
    """safetensors or bin, of the weights or of the adapter and its base."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that is loaded."""
    preprocessing: dict[str, Any] | None = None
    dtype: str | None = None
    device: str | None = None
    load_s: float | None = None
    """Reading, checking and hashing the files, loading the weights and the first batches; without imports."""
    vector_width: int | None = None
    text_tokens: int | None = None
    """Longest text, in tokens; longer ones are cut."""
    labels: str | None = None
    label_count: int | None = None
    image_tower: Tower | None = None
    text_tower: Tower | None = None
    image: str | None = None
    reference: Answer | None = None
    worker: Answer | None = None
    largest_difference: float | None = None
    """Of the scores of all labels, between the worker and the reference script."""
    same_first: bool | None = None


def run_inspect(model: str | None, *, labels: str | None, image: Path | None, as_json: bool) -> int:
    """Inspect a model, print what was found, and return the exit code: 0, or 65 if the worker cannot use the model.

    Args:
        model: folder or hub id; None for SHIWU_MODEL, or the embedded model.
        labels: name of a label set; None for the default one.
        image: the image to answer; None for a photograph in the package.
    """
    settings = load_settings_or_exit()
    settings = settings.model_copy(update={"model": model or settings.model})
    found = Inspection(model_name(settings.model))
    code = ExitCode.OK
    try:
        with redirect_stdout(sys.stderr):
            inspect(settings, labels=labels, image=image or SAMPLE, found=found)
        found.usable = True
    except FatalError as error:
        found.reason, code = str(error), error.exit_code
    if as_json:
        click.echo(printable_lines(json.dumps(asdict(found), ensure_ascii=False, indent=2)))
    else:
        _print(found)
    if found.reason is not None:
        click.echo(f"{code.name}: {found.reason}", err=True)
    return int(code)


def inspect(settings: Settings, *, labels: str | None, image: Path, found: Inspection) -> None:
    """Fill in what can be found out, in the order in which a worker uses it.

    Raises:
        FatalError: the worker could not start with this model, these labels or this image. `found` keeps what was
            known before.
    """
    sets = read_label_sets(settings)
    if labels is not None and labels not in sets:
        raise FatalError(ExitCode.CONFIG, f"--labels: expected one of {', '.join(sorted(sets))}, got {labels!r}")
    settings = settings.model_copy(update={"default_labels": labels or settings.default_labels})
    folder = model_folder(settings.model)
    checkpoint = read_checkpoint(folder)
    _describe_files(checkpoint, found)
    spec = read_image_spec(folder)
    found.preprocessing = _preprocessing(spec)
    pixels = _pixels(image, spec, settings)
    # Imported before the measured time, because torch and transformers take seconds to import.
    from shiwu_worker.stages.encode import encoder as _  # noqa: F401, PLC0415 torch takes seconds to import

    began_s = time.monotonic()
    encoder = load_encoder(settings, folder, spec)
    found.load_s = round(time.monotonic() - began_s, 3)
    found.dtype, found.device = encoder.info.dtype, encoder.info.device
    found.text_tokens = encoder.text_tokens
    label_set = sets[settings.default_labels]
    bank = load_label_bank(settings, encoder, sets)
    encode_default_labels(bank)
    found.labels, found.label_count = label_set.name, len(label_set.words)
    found.vector_width = int(bank.encoded(label_set).vectors.shape[1])
    found.image = image.name
    _compare(encoder, checkpoint, _plain(label_set), image=image, pixels=pixels, found=found)


def _describe_files(checkpoint: Checkpoint, found: Inspection) -> None:
    found.folder = str(checkpoint.folder)
    found.family = family(read_json(checkpoint.config))
    found.revision = model_revision(checkpoint.folder)
    found.files = {path.name: path.stat().st_size for path in checkpoint.files}
    kind = "safetensors" if checkpoint.is_safetensors else "bin"
    parts = f" in {len(checkpoint.weights)} parts" if len(checkpoint.weights) > 1 else ""
    found.format = f"{kind}{parts}"
    if checkpoint.adapter:
        found.format = f"adapter ({checkpoint.adapter[1].suffix[1:]}) on {checkpoint.base} ({found.format})"


def family(config: dict[str, Any]) -> str:
    """The name of the model's family, from its config.json."""
    kind = str(config.get("model_type"))
    text, vision = (
        part if isinstance(part := config.get(key), dict) else {} for key in ("text_config", "vision_config")
    )
    if kind == "siglip" and text.get("vocab_size") == SIGLIP2_VOCABULARY:
        return "SigLIP 2"
    name = FAMILIES.get(kind, kind)
    if kind == "vision-text-dual-encoder":
        return f"{name} of {vision.get('model_type')} and {text.get('model_type')}"
    return name


def _preprocessing(spec: ImageSpec) -> dict[str, Any]:
    return {
        "width": spec.width,
        "height": spec.height,
        "resize": spec.resize,
        "shortest_edge": spec.shortest_edge,
        "filter": Image.Resampling(spec.resample).name.lower(),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "rescale": spec.rescale,
    }


def _pixels(image: Path, spec: ImageSpec, settings: Settings) -> NDArray[np.uint8]:
    """The pixels of the image as a loader makes them. The decoder runs in this process, without a sandbox."""
    try:
        data = image.read_bytes()
        return decode(data, spec=spec, limits=decode_limits(settings), is_exact=settings.exact_decode)[0]
    except OSError as error:
        raise FatalError(ExitCode.CONFIG, f"{image}: cannot be read ({error.strerror or error})") from error
    except Rejected as error:
        raise FatalError(ExitCode.CONFIG, f"{image}: {error}") from error


def _plain(label_set: LabelSet) -> LabelSet:
    """The label set as a script has it: one template, and the model's own scale and bias."""
    return replace(label_set, templates=label_set.templates[:1], scale=None, bias=None, rules=None)


# ------------------------------------------------------------------------------------ both answers
def _compare(
    encoder: Encoder,
    checkpoint: Checkpoint,
    label_set: LabelSet,
    *,
    image: Path,
    pixels: NDArray[np.uint8],
    found: Inspection,
) -> None:
    """Score the image with the worker's parts and with the reference script, and count the parameters of the latter."""
    texts = [label_set.templates[0].replace("{}", word) for word in label_set.words]
    head: Head = "sigmoid" if label_set.head == "sigmoid" and encoder.bias is not None else "softmax"
    own = score(
        encoder.encode(pixels[None]), encoder.encode_texts(texts), head=head, scale=encoder.scale, bias=encoder.bias
    )[0][0]
    found.worker = _answer(own, label_set.words)
    from shiwu_worker.commands.reference_script import (  # noqa: PLC0415 torch takes seconds to import
        reference_logits,
        reference_model,
    )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = reference_model(checkpoint)
            found.image_tower, found.text_tower = _towers(model, DTYPE_BYTES[encoder.info.dtype])
            logits = reference_logits(model, checkpoint, image, texts, max_tokens=encoder.text_tokens)
    except Exception as error:  # noqa: BLE001 border: any error of three libraries; the worker does not need the script
        found.warnings.append(f"the reference script failed ({first_line(error)})")
        return
    theirs = _sigmoid(logits) if head == "sigmoid" else _softmax(logits)
    found.reference = _answer(theirs, label_set.words)
    found.largest_difference = round(float(np.abs(own - theirs).max()), SCORE_DIGITS)
    found.same_first = found.worker.labels[0] == found.reference.labels[0]
    if not found.same_first or found.largest_difference > MAX_DIFFERENCE:
        found.warnings.append(
            f"worker and reference script differ by up to {found.largest_difference:g}; SHIWU_DTYPE=float32 and "
            "SHIWU_EXACT_DECODE=1 show whether number format or decoding is the reason"
        )


def _towers(model: Any, dtype_bytes: int) -> tuple[Tower, Tower]:
    """Parameters of the image and the text tower, each with its projection."""
    counts = {"image": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if name.startswith(("vision", "visual")):
            counts["image"] += parameter.numel()
        elif name.startswith("text"):
            counts["text"] += parameter.numel()
    return Tower(counts["image"], counts["image"] * dtype_bytes), Tower(counts["text"], counts["text"] * dtype_bytes)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max())
    shares: NDArray[np.float32] = powers / powers.sum()
    return shares


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    chances: NDArray[np.float32] = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return chances


def _answer(scores: NDArray[np.float32], words: Sequence[str]) -> Answer:
    best = np.argsort(-scores, kind="stable")[:TOP].tolist()
    return Answer([words[index] for index in best], [round(float(scores[index]), SCORE_DIGITS) for index in best])


# ------------------------------------------------------------------------------------ output
def _print(found: Inspection) -> None:
    """A table on a terminal, and `name: value` lines elsewhere."""
    rows = [(name, printable(value)) for name, value in _rows(found)]
    if not sys.stdout.isatty():
        for name, value in rows:
            click.echo(f"{name}: {value}")
        return
    table = Table(show_header=False)
    for name, value in rows:
        style = {"usable": "green" if found.usable else "red", "warning": "yellow"}.get(name, "")
        table.add_row(name, value, style=style)
    Console(markup=False, emoji=False, highlight=False).print(table)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """Names and texts of everything that is known."""
    rows: tuple[tuple[str, str | None], ...] = (
        ("model", found.model),
        ("family", found.family),
        ("revision", found.revision),
        ("folder", found.folder),
        ("weights", found.format),
        ("files", _files_text(found.files) or None),
        ("preprocessing", _text(_preprocessing_text, found.preprocessing)),
        ("text limit", _text("{} tokens".format, found.text_tokens)),
        ("device", found.device),
        ("dtype", found.dtype),
        ("load and warm-up", _text("{:.2f} s".format, found.load_s)),
        ("labels", _text(f"{found.labels}: {{}}, all readable and apart".format, found.label_count)),
        ("vector width", _text(str, found.vector_width)),
        ("image tower", _text(_tower_text, found.image_tower)),
        ("text tower", _text(_tower_text, found.text_tower)),
        ("image", found.image),
        ("reference script", _text(_answer_text, found.reference)),
        ("worker", _text(_answer_text, found.worker)),
        ("comparison", _comparison_text(found)),
    )
    yield from ((name, text) for name, text in rows if text is not None)
    yield from (("warning", warning) for warning in found.warnings)
    yield "usable", "yes" if found.usable else f"no: {found.reason}"


def _text(make: Callable[[T], str], value: T | None) -> str | None:
    return None if value is None else make(value)


def _files_text(files: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size_text(size)}" for name, size in files.items())


def _preprocessing_text(spec: dict[str, Any]) -> str:
    how = f"crop after shortest edge {spec['shortest_edge']}" if spec["resize"] == "crop" else "squash"
    mean, std = (" ".join(f"{one:.4g}" for one in spec[key]) for key in ("mean", "std"))
    rescale = "" if abs(spec["rescale"] - 1 / 255) < 1e-9 else f", rescale {spec['rescale']:.4g}"
    return f"{spec['width']}×{spec['height']}, {how}, {spec['filter']}, mean {mean}, std {std}{rescale}"


def _tower_text(tower: Tower) -> str:
    return f"{tower.parameters / 1e6:.1f} M parameters, {_size_text(tower.bytes)} in this dtype"


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _answer_text(answer: Answer) -> str:
    return ", ".join(f"{label} {each:.4f}" for label, each in zip(answer.labels, answer.scores, strict=True))


def _comparison_text(found: Inspection) -> str | None:
    if found.largest_difference is None:
        return None
    first = "the same first label" if found.same_first else "another first label"
    return f"{first}, scores differ by {found.largest_difference:.6f} at most"
