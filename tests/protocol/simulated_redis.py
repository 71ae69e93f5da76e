"""A client of a real server on which the explorer decides what time it is and which replies are lost.

The scripts are the product's own. Only `redis.call('TIME')` in them reads the explorer's clock, which is a key; the
TTLs of all keys move with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final, Literal

import redis
from redis.exceptions import NoScriptError

Fault = Literal["", "lost", "unsent", "repeated", "late"]
"""What happens to one script call: nothing; its reply is lost; it never arrives; the client repeats it by itself; it
arrives long after the client has given up."""
CLOCK_KEY: Final = "explorer:clock"
START_MS: Final = 1_800_000_000_000
"""The explorer's clock at the start of a schedule, in ms since 1970."""
TIME_CALL: Final = "redis.call('TIME')"
PACKAGES: Final = ("shiwu.broker", "shiwu_worker.stages.claim")
"""Packages that have scripts."""
SOURCES: Final = {
    file.name: file.read_text(encoding="utf-8")
    for package in PACKAGES
    for file in (files(package) / "scripts").iterdir()
    if file.name.endswith(".lua")
}
"""Each script of the product, by its file name."""
_CLOCK: Final = f"""
local function explorer_time()
  local ms = tonumber(redis.call('GET', '{CLOCK_KEY}'))
  return {{ string.format('%.0f', math.floor(ms / 1000)), string.format('%.0f', ms % 1000 * 1000) }}
end
"""
_MOVE_CLOCK: Final = f"""
local by = tonumber(ARGV[1])
redis.call('INCRBY', '{CLOCK_KEY}', by)
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 and left <= by then
    redis.call('DEL', key)
  elseif left >= 0 then
    redis.call('PEXPIRE', key, left - by)
  end
end
"""
_DUMP: Final = f"""
local readers = {{
  string = function(key) return redis.call('GET', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
}}
local reply = {{}}
for _, key in ipairs(redis.call('KEYS', '*')) do
  if key ~= '{CLOCK_KEY}' then
    local kind = redis.call('TYPE', key).ok
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3] = key, kind, redis.call('PTTL', key)
    reply[n + 4] = readers[kind] and readers[kind](key) or ''
  end
end
return reply
"""


class SimulatedRedis(redis.Redis):
    """A client whose server has the explorer's clock. One thread only."""

    changes: Mapping[str, tuple[str, str]] = MappingProxyType({})
    """Script → a text in it, and what stands there instead: defects, to see that they are found."""

    def begin(self) -> None:
        """Empty the server and set the clock to the start."""
        if not hasattr(self, "names"):
            self.names: dict[str, str] = {}
            self._registered: dict[str, Any] = {}
            self.runs: Counter[str] = Counter()
            self._dump_all = super().register_script(_DUMP)
            self._move = super().register_script(_MOVE_CLOCK)
        self.now_ms = START_MS
        self.faults: dict[str, Fault] = {}
        """Script, or '' for any → what happens to its next call."""
        self.postponed: list[tuple[Any, ...]] = []
        """Calls that did not arrive yet."""
        self.interruptions: dict[str, Callable[[], None]] = {}
        """Script → what happens before its next call."""
        with self.pipeline(transaction=False) as pipe:
            pipe.flushall()
            pipe.set(CLOCK_KEY, START_MS)
            pipe.execute()

    def move_clock(self, by_ms: int) -> None:
        """Let time pass, or set the clock back."""
        self._move(args=[by_ms])
        self.now_ms += by_ms

    def deliver(self) -> None:
        """The oldest postponed call arrives."""
        with suppress(NoScriptError):
            super().evalsha(*self.postponed.pop(0))

    def dump_all(self) -> list[Any]:
        """Each key, its type, its TTL in ms, and its value."""
        dumped: list[Any] = self._dump_all()
        return dumped

    def time(self, **_: Any) -> tuple[int, int]:
        """The explorer's clock."""
        return self.now_ms // 1000, self.now_ms % 1000 * 1000

    def register_script(self, script: Any) -> Any:
        """The same script with the explorer's clock."""
        if script in self._registered:
            return self._registered[script]
        name = _name_of(script)
        old, new = self.changes.get(name, ("", ""))
        assert old in script
        changed = script.replace(old, new) if old else script
        registered = super().register_script(_CLOCK + changed.replace(TIME_CALL, "explorer_time()"))
        self._registered[script] = registered
        self.names[registered.sha] = name
        return registered

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script; the next fault happens to it."""
        if sha not in self.names:
            return super().evalsha(sha, numkeys, *keys_and_args)
        interruption = self.interruptions.pop(self.names[sha], None)
        if interruption is not None:
            interruption()
        fault: Fault = self.faults.pop(self.names[sha], "") or self.faults.pop("", "")
        if fault == "late":
            self.postponed.append((sha, numkeys, *keys_and_args))
        if fault in {"unsent", "late"}:
            raise redis.ConnectionError("the command did not arrive")
        try:
            reply = super().evalsha(sha, numkeys, *keys_and_args)
        except NoScriptError:
            self.faults[self.names[sha]] = fault  # redis-py loads the script and calls again
            raise
        self.runs[self.names[sha]] += 1
        if fault == "repeated":
            return super().evalsha(sha, numkeys, *keys_and_args)
        if fault == "lost":
            raise redis.ConnectionError("the reply was lost")
        return reply


def _name_of(script: str) -> str:
    """The file name of a script, which may have been wrapped."""
    return next(name for name, source in SOURCES.items() if source in script)


def pairs(flat: Sequence[bytes]) -> Mapping[bytes, bytes]:
    """A hash or sorted set from its flat reply."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
