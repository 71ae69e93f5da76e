"""Moves values of a wrong type aside, so that a key that another program wrote does not stop workers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import redis

from shiwu.broker.redis_errors import RedisCode, classify
from shiwu.broker.script_loader import load_script
from shiwu.contract import FOREIGN, KEY_TYPES, Lane

KEPT_S: Final = 7 * 86_400
"""How long a moved value is kept."""
_TYPES: Final = {**KEY_TYPES, **dict.fromkeys((key for lane in Lane for key in lane.keys), "list")}


@dataclass(frozen=True, slots=True)
class ForeignValue:
    """A value that was moved."""

    key: str
    """The key of shiwu under which it stood."""
    type: str
    """Its type, as Redis' TYPE names it."""
    moved_to: str


class ForeignValues:
    """Moves values of a wrong type away from the keys of shiwu. Thread-safe; one round trip."""

    def __init__(self, client: redis.Redis) -> None:
        self._move = load_script(client, "move_foreign")

    def move(self) -> list[ForeignValue]:
        """Move them to keys that begin with `FOREIGN`; return what was moved.

        Moves nothing where the Redis user may not: the ACL files of earlier versions lack the right.

        Raises:
            redis.RedisError: Redis is unavailable.
        """
        try:
            targets = [f"{FOREIGN}{key}:{time.time() * 1000:.0f}" for key in _TYPES]
            reply: Any = self._move(keys=[*_TYPES, *targets], args=[KEPT_S, *_TYPES.values()])
        except redis.ResponseError as error:
            if classify(error) is RedisCode.PERMISSION:
                return []
            raise
        texts = [part.decode(errors="replace") for part in reply]
        return [ForeignValue(*texts[i : i + 3]) for i in range(0, len(texts), 3)]
