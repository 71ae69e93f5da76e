"""Gives kept vectors the tags of a label set: block by block, by the worker's own scoring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import click
from rich.console import Console
from rich.progress import Progress

from shiwu.contract import (
    CONTRACT_VERSION,
    Answer,
    ImageInfo,
    ModelInfo,
    Request,
    Status,
    Tag,
)
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.label_vectors import EncodedLabels
from shiwu_worker.retag.changes import Changes
from shiwu_worker.retag.label_texts import Prepared
from shiwu_worker.retag.options import RetagOptions
from shiwu_worker.retag.output import new_file
from shiwu_worker.retag.vector_parts import Origin, VectorBlock, VectorParts
from shiwu_worker.stages.score.scorer import Scorer

CELLS: Final = 1 << 20
"""Cosines of one block: scoring takes some 60 bytes for each."""
MIN_ROWS: Final = 16
MAX_ROWS: Final = 4096


def retag(options: RetagOptions, prepared: Prepared, request: Request) -> None:
    """Write an answer for every vector, and the report of what changed.

    Raises:
        FatalError: with ExitCode.CONFIG, vectors of another model or damaged, or a file that cannot be written.
    """
    began_s = time.monotonic()
    parts = VectorParts(options.vectors)
    rows = _check_origins(parts, prepared.origin, is_skipping=options.is_skipping)
    retagging = _Retagging(prepared, request)
    with ExitStack() as stack:
        out = stack.enter_context(new_file(options.out))
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = progress.add_task("vectors", total=rows)
        for block in parts.blocks(rows=retagging.rows, only=prepared.origin if options.is_skipping else None):
            out.writelines(retagging.lines(block))
            progress.advance(task, len(block.vectors))
    label_set = prepared.labels.label_set
    took_s = time.monotonic() - began_s
    text = f"{rows} images in {took_s:.1f} s with {len(label_set.words)} labels ({label_set.name})"
    click.echo(f"{text}; {retagging.untagged} have no tag", err=True)
    if retagging.changes is not None:
        _report(retagging.changes, options)


def _check_origins(parts: VectorParts, origin: Origin, *, is_skipping: bool) -> int:
    """How many vectors are of this model.

    Raises:
        FatalError: with ExitCode.CONFIG, when there are others, or none of this model.
    """
    others = {each: count for each, count in parts.origins.items() if each != origin}
    rows = parts.origins.get(origin, 0)
    if rows and (is_skipping or not others):
        return rows
    found = ", ".join(f"{count} of {each.model} {each.revision}" for each, count in sorted(others.items())[:5])
    text = f"expected vectors of {origin.model} with the revision {origin.revision}, got {found or 'none'}"
    hint = "--skip-other-models leaves them out" if rows else "name their model by --model, or tag the images again"
    raise FatalError(ExitCode.CONFIG, f"{text}; vectors of two models cannot be compared: {hint}")


class _Retagging:
    """Scores blocks with one label set, or with two to find the changes."""

    def __init__(self, prepared: Prepared, request: Request) -> None:
        origin = prepared.origin
        self._scorer = Scorer(
            scale=prepared.scale,
            bias=prepared.bias,
            model=ModelInfo(id=origin.model, revision=origin.revision, dtype="", device=""),
            max_tags_bytes=prepared.max_tags_bytes,
        )
        self._labels, self._older = prepared.labels, prepared.older
        self._request = request
        widest = max(len(each.vectors) for each in (self._labels, self._older) if each is not None)
        self.rows = max(MIN_ROWS, min(MAX_ROWS, CELLS // widest))
        """Vectors of a block."""
        self.changes = None if self._older is None else Changes()
        self.untagged = 0

    def lines(self, block: VectorBlock) -> Iterator[bytes]:
        """Yield the answers of a block as JSON lines.

        Raises:
            FatalError: with ExitCode.CONFIG, when the vectors have another width than those of the labels.
        """
        width, expected = block.vectors.shape[1], self._labels.vectors.shape[1]
        if width != expected:
            raise FatalError(ExitCode.CONFIG, f"expected vectors of {expected} numbers, got {width}")
        before = None if self._older is None else self._tags(block, self._older)
        for row, tags in enumerate(self._tags(block, self._labels)):
            line = self._answer(block, row, tags).to_json() + b"\n"
            self.untagged += not tags
            if self.changes is not None and before is not None:
                self.changes.add(block.texts["reference"][row] or "", line, before=before[row], after=tags)
            yield line

    def _tags(self, block: VectorBlock, labels: EncodedLabels) -> list[tuple[Tag, ...]]:
        return self._scorer.kept_tags(block.vectors, labels, [self._request] * len(block.vectors))

    def _answer(self, block: VectorBlock, row: int, tags: tuple[Tag, ...]) -> Answer:
        """The answer that a worker gives to a new job for this image, without its times."""
        texts, labels = block.texts, self._labels
        kept, cut = self._scorer.fitting(tags)
        return Answer(
            texts["id"][row] or "",
            Status.TAGGED,
            CONTRACT_VERSION,
            ImageInfo(reference=texts["reference"][row] or "", sha256=texts["sha256"][row]),
            kept,
            labels.info,
            ModelInfo(*(texts[name][row] or "" for name in ("model", "revision", "dtype", "device"))),
            warnings=(*labels.warnings, *((cut,) if cut else ())) or None,
            unknown=labels.label_set.is_unknown(kept) or None,
        )


def _report(changes: Changes, options: RetagOptions) -> None:
    for line in changes.report():
        click.echo(line, err=options.out == "-")
    if not changes.sorted():
        click.echo("no image has other tags", err=True)
    if options.examples_out is not None:
        with new_file(options.examples_out) as file:
            file.writelines(changes.example_lines())
