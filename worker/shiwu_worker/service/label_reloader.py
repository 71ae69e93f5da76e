"""Reads the label sets of the operator again while the worker runs: when a file changes, or on SIGHUP.

The sets are taken over whole or not at all. Their texts are encoded in portions between batches, at the share of bulk
jobs. A job keeps the set that it had when it was admitted.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from shiwu.contract import ErrorInfo
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.stages.score.label_bank import LabelBank

log: FilteringBoundLogger = structlog.get_logger()
TICK_S: Final = 0.5
"""Interval of looks whether a signal asked for the files."""
ENCODE_TIMEOUT_S: Final = 3600.0
"""After this time new sets are given up: a CPU may take minutes for thousands of labels."""
MAX_NAMED: Final = 20
"""Labels of one kind that a log line names."""
SUFFIXES: Final = (".yaml", ".yml", ".json")
EncodeAhead = Callable[[LabelSet, Callable[[EncodedLabels | ErrorInfo], None]], None]


class LabelReloader:
    """Owns a thread. `ask` may be called from a signal handler.

    Args:
        folder: where the operator's files are.
        poll_s: how often the folder is looked at; 0 for never.
        read: all label sets by name; raises FatalError with the fault of a file.
        encode_ahead: encodes a set and passes it, or why that failed, to its second argument.
        check_default: raises FatalError if the model cannot use the default set.
        on_end: gets whether new files were taken over; called for each change.
    """

    def __init__(
        self,
        bank: LabelBank,
        *,
        folder: Path,
        poll_s: float,
        read: Callable[[], Mapping[str, LabelSet]],
        encode_ahead: EncodeAhead,
        check_default: Callable[[EncodedLabels], None],
        on_end: Callable[[bool], None],
    ) -> None:
        self._bank = bank
        self._folder = folder
        self._poll_s = poll_s
        self._read = read
        self._encode_ahead = encode_ahead
        self._check_default = check_default
        self._on_end = on_end
        self._is_asked = False
        self._closed = threading.Event()
        # Not the present state: files may have changed since they were read, because a model takes long to load.
        self._loaded_stamp: Hashable = None
        self._seen_stamp: Hashable = None
        self.thread = ServiceThread("label-sets", self._run, on_fatal=None, stop=self._closed.set)

    def ask(self) -> None:
        """Have the files read soon, also if none has changed. Only sets a flag."""
        self._is_asked = True

    def _run(self) -> None:
        look_due_s = time.monotonic() + self._poll_s
        while not self._closed.wait(TICK_S):
            is_asked, self._is_asked = self._is_asked, False
            has_changed = False
            if not is_asked and self._poll_s and time.monotonic() >= look_due_s:
                look_due_s = time.monotonic() + self._poll_s
                has_changed = self._has_changed()
            if is_asked:
                self._loaded_stamp = self._seen_stamp = folder_stamp(self._folder)
            if is_asked or has_changed:
                self._reload(is_asked=is_asked)

    def _has_changed(self) -> bool:
        """Whether the folder has changed and was the same at the last look, so that no program is writing to it."""
        stamp = folder_stamp(self._folder)
        is_settled, self._seen_stamp = stamp == self._seen_stamp, stamp
        if not is_settled or stamp == self._loaded_stamp:
            return False
        self._loaded_stamp = stamp
        return True

    def _reload(self, *, is_asked: bool) -> None:
        began_s = time.monotonic()
        try:
            sets = self._read()
            changes = changed_sets(self._bank.sets, sets)
            if not changes:
                if is_asked:
                    log.info("label_sets_unchanged", sets=len(sets))
                return
            self._bank.check(sets)
            encoded = self._encode([label_set for name, label_set in sets.items() if name in changes])
            if encoded is None:
                return
            default = self._bank.default_of(sets)
            for each in encoded:
                if each.label_set == default:
                    self._check_default(each)
            self._bank.install(sets, encoded)
        except Exception as error:  # border: without its thread no later change of the files would be seen
            log.error(
                "label_sets_not_reloaded",
                error=str(error),
                meaning="the worker goes on with the sets that it has",
                exc_info=not isinstance(error, FatalError | ValueError | OSError),
            )
            self._on_end(False)
        else:
            log.info("label_sets_reloaded", changes=changes, took_s=round(time.monotonic() - began_s, 3))
            self._on_end(True)

    def _encode(self, sets: Sequence[LabelSet]) -> list[EncodedLabels] | None:
        """The sets with their vectors; None when the worker stops meanwhile.

        Raises:
            FatalError: the model fails on the labels; here no reason to end the process.
            ValueError: it takes too long.
        """
        ended: queue.SimpleQueue[EncodedLabels | ErrorInfo] = queue.SimpleQueue()
        for label_set in sets:
            self._encode_ahead(label_set, ended.put)
        until_s = time.monotonic() + ENCODE_TIMEOUT_S
        results: list[EncodedLabels] = []
        while len(results) < len(sets):
            if self._closed.is_set():
                return None
            if time.monotonic() >= until_s:
                raise ValueError(f"expected labels that the model encodes within {ENCODE_TIMEOUT_S:.0f} s")
            try:
                result = ended.get(timeout=TICK_S)
            except queue.Empty:
                continue
            if isinstance(result, ErrorInfo):
                raise FatalError(ExitCode.MODEL, result.message)
            results.append(result)
        # Sets with equal texts share their vectors, which `results` keeps alive until here.
        return [known for label_set in sets if (known := self._bank.known(label_set)) is not None]


def folder_stamp(folder: Path) -> Hashable:
    """What changes when a file of label sets does; links are followed, as Kubernetes swaps the link to a folder."""
    found: list[tuple[str, int, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES):
                    about = entry.stat()
                    found.append((entry.name, about.st_ino, about.st_mtime_ns, about.st_size))
    except OSError as error:
        return str(error)
    return tuple(sorted(found))


def changed_sets(old: Mapping[str, LabelSet], new: Mapping[str, LabelSet]) -> dict[str, dict[str, object]]:
    """The sets that differ, by name: their digests, and the labels that are added, removed or changed otherwise."""
    changes: dict[str, dict[str, object]] = {}
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before != after:
            words, former = _words(after), _words(before)
            changes[name] = {
                "old_digest": None if before is None else before.info.digest,
                "new_digest": None if after is None else after.info.digest,
                "added": [word for word in words if word not in former][:MAX_NAMED],
                "removed": [word for word in former if word not in words][:MAX_NAMED],
                "changed": [word for word in words if word in former and words[word] != former[word]][:MAX_NAMED],
            }
    return changes


def _words(label_set: LabelSet | None) -> dict[str, object]:
    """Each label with what is its own."""
    if label_set is None:
        return {}
    rules, least = label_set.rules, label_set.min_cosines
    own: Sequence[object] = least or [None] * len(label_set.words)
    if rules is not None:
        own = list(
            zip(rules.phrases, rules.groups, rules.parents, rules.hidden, rules.thresholds, rules.aliases, strict=True)
        )
    return dict(zip(label_set.words, own, strict=True))
