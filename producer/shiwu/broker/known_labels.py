"""The labels behind a digest: workers note each set that they answer with, and anybody may ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.script_loader import load_script
from shiwu.contract import LABELS, LABELS_OF_REQUESTS

MAX_OF_REQUESTS: Final = 1000
MAX_REQUEST_BYTES: Final = 16 * 1024
MAX_NAMED_BYTES: Final = 1024 * 1024


class KnownLabels(msgspec.Struct, frozen=True, omit_defaults=True):
    """A label set, as the worker had it that answered with its digest."""

    digest: str
    labels: tuple[str, ...]
    name: str | None = None
    """None for labels that a request brought along."""
    templates: tuple[str, ...] = ("{}",)
    head: str = "softmax"
    scale: float | None = None
    bias: float | None = None
    min_cosines: tuple[float, ...] | None = None


class KnownLabelStore:
    """Notes label sets, and finds them again. Thread-safe; raises redis.RedisError."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._script = load_script(client, "note_labels")

    def note(self, sets: Sequence[KnownLabels]) -> None:
        """Keep these sets, but for those whose JSON is too long."""
        args: list[Any] = []
        for one in sets:
            text = msgspec.json.encode(one)
            is_of_request = one.name is None
            if len(text) <= (MAX_REQUEST_BYTES if is_of_request else MAX_NAMED_BYTES):
                args += [one.digest, text, int(is_of_request)]
        if args:
            self._script(keys=[LABELS, LABELS_OF_REQUESTS], args=[MAX_OF_REQUESTS, *args])

    def find(self, digest: str) -> KnownLabels | None:
        """The set with this digest, or None where no worker has noted it or it is no longer kept."""
        text: Any = self._client.hget(LABELS, digest)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text, type=KnownLabels)
        except msgspec.MsgspecError:
            return None
