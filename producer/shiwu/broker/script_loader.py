"""Loads the Lua scripts of a package."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final, Protocol

import redis

from shiwu.broker.steps import Call
from shiwu.contract import CALL_REPLY

REPLY_KEPT_S: Final = 60
"""How long the reply of a call is kept; longer than a client repeats the call."""
_REPEATABLE: Final = """
local reply_key = table.remove(KEYS)
local kept = redis.call('GET', reply_key)
if kept then return cmsgpack.unpack(kept) end
local function run()
{source}
end
local reply = run()
redis.pcall('SET', reply_key, cmsgpack.pack(reply), 'EX', {kept_s})
return reply
"""


class Script(Protocol):
    """A Lua script that runs on the server in one step. redis-py loads it again where the server has lost it."""

    def __call__(self, keys: Sequence[str] = ..., args: Iterable[Any] = ..., client: redis.Redis | None = None) -> Any:
        """Run the script; `client` replaces the client that loaded it.

        Raises:
            redis.RedisError: the script failed, or Redis is unavailable.
        """


class _RepeatableScript:
    """A script whose calls each have a key for their reply, so that a repeated call gives the reply of the first."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def __call__(self, keys: Sequence[str] = (), args: Iterable[Any] = (), client: redis.Redis | None = None) -> Any:
        return self._script(keys=[*keys, f"{CALL_REPLY}{secrets.token_hex(8)}"], args=args, client=client)


def load_script(client: redis.Redis, name: str, *, package: str = "shiwu.broker") -> Script:
    """The script `scripts/<name>.lua` of a package. Nothing is sent before its first call."""
    return _register(client, _source(name, package))


def load_repeatable_script(client: redis.Redis, name: str, *, package: str = "shiwu.broker") -> Script:
    """As `load_script`, for a script that is not idempotent and a client that repeats commands after a lost connection.

    Each call has a token. The script stores its reply under it for a minute and returns it to a repeated call, which
    changes nothing.
    """
    source = _REPEATABLE.format(source=_source(name, package), kept_s=REPLY_KEPT_S)
    return _RepeatableScript(_register(client, source))


def call_script(name: str, *, keys: Sequence[str], args: Iterable[Any]) -> Call:
    """A step that runs the script `scripts/<name>.lua`."""
    args = list(args)
    return lambda client: _register(client, _source(name, "shiwu.broker"))(keys=keys, args=args)


def call_repeatable_script(name: str, *, keys: Sequence[str], args: Iterable[Any]) -> Call:
    """As `call_script`, for a script that `load_repeatable_script` loads."""
    args = list(args)
    return lambda client: load_repeatable_script(client, name)(keys=keys, args=args)


@cache
def _source(name: str, package: str) -> str:
    return files(package).joinpath(f"scripts/{name}.lua").read_text(encoding="utf-8")


def _register(client: redis.Redis, source: str) -> Script:
    script: Script = client.register_script(source)
    return script
