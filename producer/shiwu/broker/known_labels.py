"""Stores label sets by digest, so that a client can look up the labels behind the digest of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.script_loader import load_script
from shiwu.broker.steps import Steps, run
from shiwu.contract import LABELS, LABELS_OF_REQUESTS

MAX_REQUEST_SETS: Final = 1000
"""Label sets of single requests that are kept; the oldest are removed."""
MAX_REQUEST_BYTES: Final = 16 * 1024
MAX_NAMED_BYTES: Final = 1024 * 1024


class KnownLabels(msgspec.Struct, frozen=True, omit_defaults=True):
    """A label set as the worker used it for an answer with this digest."""

    digest: str
    labels: tuple[str, ...]
    name: str | None = None
    """None for labels that came with a request."""
    templates: tuple[str, ...] = ("{}",)
    head: str = "softmax"
    scale: float | None = None
    bias: float | None = None
    min_cosines: tuple[float, ...] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    """The texts of each label, in a label set of version 2."""
    groups: tuple[str | None, ...] | None = None
    """The group of each label, in a label set of version 2."""
    unknown: str | None = None
    """The label of images that get no other."""
    calibration: str | None = None
    """Digest of the calibration file."""
    aliases: tuple[tuple[str, ...], ...] | None = None
    """Further names of each label, in a label set of version 2 that has some; they change neither tags nor digest."""


class KnownLabelStore:
    """Stores and finds label sets. Thread-safe; each method is one round trip and may raise redis.RedisError."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._script = load_script(client, "note_labels")

    def note(self, sets: Sequence[KnownLabels]) -> None:
        """Store these sets, except for those whose JSON is too long."""
        args: list[Any] = []
        for label_set in sets:
            text = msgspec.json.encode(label_set)
            is_of_request = label_set.name is None
            if len(text) <= (MAX_REQUEST_BYTES if is_of_request else MAX_NAMED_BYTES):
                args += [label_set.digest, text, int(is_of_request)]
        if args:
            self._script(keys=[LABELS, LABELS_OF_REQUESTS], args=[MAX_REQUEST_SETS, *args])

    def find(self, digest: str) -> KnownLabels | None:
        """The set with this digest, or None where no worker has stored it or it is no longer kept."""
        return run(self._client, find_labels_steps(digest))


def find_labels_steps(digest: str) -> Steps[KnownLabels | None]:
    """Ask for the set with this digest; None where no worker has stored it or it is no longer kept."""
    text = yield lambda client: client.hget(LABELS, digest)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=KnownLabels)
    except msgspec.MsgspecError:
        return None
