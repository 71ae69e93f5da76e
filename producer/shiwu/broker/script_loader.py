"""Loads the Lua scripts of a package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, Protocol

import redis


class Script(Protocol):
    """A Lua script that runs on the server in one step. redis-py loads it again where the server has lost it."""

    def __call__(self, keys: Sequence[str] = ..., args: Iterable[Any] = ..., client: redis.Redis | None = None) -> Any:
        """Run the script; `client` replaces the client that loaded it.

        Raises:
            redis.RedisError: the script failed, or Redis is unavailable.
        """


def load_script(client: redis.Redis, name: str, *, package: str = "shiwu.broker") -> Script:
    """The script `scripts/<name>.lua` of a package. Nothing is sent before its first call."""
    source = files(package).joinpath(f"scripts/{name}.lua").read_text(encoding="utf-8")
    script: Script = client.register_script(source)
    return script
