"""`shiwu-worker labels shadow`: adds up what workers have logged of a shadow label set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final

import click
import msgspec

from shiwu.contract import printable
from shiwu_worker.commands.difference_tables import differences_as_json, print_differences
from shiwu_worker.jobs.tag_differences import TagDifferences

EVENT: Final = "shadow_compared"
MAX_LINE_BYTES: Final = 1 << 20
NOT_FOUND: Final = 1


class ShadowSets(msgspec.Struct, frozen=True):
    """The two label sets of a log line."""

    label_set: str
    digest: str
    shadow: str
    shadow_digest: str


class ShadowLine(ShadowSets, frozen=True):
    """One log line of one worker: what was compared since its last one."""

    images: int
    same: int
    top1_changed: int
    dropped: int
    tags_same: int
    tags_added: int
    tags_removed: int
    changes: list[tuple[str, int, int, int, str]]
    """Label, images that keep it, get it and lose it, and an image that gets or loses it."""
    changes_left_out: int = 0
    """Further labels with changes."""


@dataclass(slots=True)
class _Sum:
    found: TagDifferences = field(default_factory=TagDifferences)
    dropped: int = 0
    left_out: int = 0

    def add(self, line: ShadowLine) -> None:
        found = self.found
        found.images += line.images
        found.same += line.same
        found.top1 += line.top1_changed
        self.dropped += line.dropped
        self.left_out += line.changes_left_out
        found.unnamed.update(same=line.tags_same, added=line.tags_added, removed=line.tags_removed)
        for label, kept, added, removed, image in line.changes:
            found.kept[label] += kept
            found.added[label] += added
            found.removed[label] += removed
            found.unnamed.subtract({"same": kept, "added": added, "removed": removed})
            found.add_example(label, image)


def run_shadow(log: BinaryIO, *, as_json: bool) -> int:
    """Print the sums of each pair of label sets in the log, and return the exit code."""
    sums: dict[ShadowSets, _Sum] = {}
    for line in _lines(log):
        sets = ShadowSets(line.label_set, line.digest, line.shadow, line.shadow_digest)
        sums.setdefault(sets, _Sum()).add(line)
    if not sums:
        text = f"expected log lines of workers as JSON with the event {EVENT}, got none; each worker with SHIWU_SHADOW "
        click.echo(f"{text}and images to compare writes one in a minute", err=True)
        return NOT_FOUND
    if as_json:
        found = [
            {**msgspec.structs.asdict(sets), "dropped": each.dropped, **differences_as_json(each.found)}
            for sets, each in sums.items()
        ]
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return 0
    for sets, each in sums.items():
        click.echo(
            f"{printable(sets.label_set)} ({sets.digest[:12]}) with the shadow {printable(sets.shadow)} "
            f"({sets.shadow_digest[:12]})"
        )
        print_differences(each.found)
        if each.dropped:
            click.echo(
                f"{each.dropped} images were not compared: the labels had no vectors yet, or the worker was busy"
            )
        if each.left_out:
            click.echo("counts of single labels may be too low: a log line names a bounded number of labels")
    return 0


def _lines(log: BinaryIO) -> Iterator[ShadowLine]:
    """The lines of the event; all others are skipped."""
    while line := log.readline(MAX_LINE_BYTES):
        start = line.find(b"{")
        if EVENT.encode() not in line or start < 0:
            continue
        try:
            # `kubectl logs --prefix` and Docker write something before the line.
            yield msgspec.json.decode(line[start:], type=ShadowLine)
        except msgspec.MsgspecError:
            continue
