"""Makes every Lua script fail on the server that touches a key which its caller did not declare."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest
import redis

ROOT: Final = Path(__file__).resolve().parents[2]
SCRIPTS: Final = {
    f"{path.parent.parent.name}/{path.stem}": path.read_text(encoding="utf-8")
    for side in ("producer", "worker")
    for path in sorted((ROOT / side).rglob("*.lua"))
}
"""Package and name of each script of the product → its text."""
_PRELUDE: Final = """
local server_redis, declared = redis, {{}}
for _, key in ipairs(KEYS) do declared[key] = true end
for _, key in ipairs({{ {allowed} }}) do declared[key] = true end
local ALL = {{ EXISTS = true, DEL = true, UNLINK = true, MGET = true }}
local FIRST_TWO = {{ RENAME = true, LMOVE = true }}
local SECOND = {{ XINFO = true, XGROUP = true }}
local NO_KEY = {{ TIME = true, PUBLISH = true, SPUBLISH = true }}
local function check_keys(command, ...)
  local name, arguments = string.upper(command), {{ ... }}
  local first, last = 1, 1
  if NO_KEY[name] then return end
  if ALL[name] then last = #arguments end
  if SECOND[name] then first = 2 end
  if FIRST_TWO[name] or SECOND[name] then last = 2 end
  for i = first, last do
    local key = tostring(arguments[i])
    if not declared[key] then error('{name} touches a key that is not in KEYS: ' .. name .. ' ' .. key) end
  end
end
local redis = setmetatable({{
  call = function(...) check_keys(...) return server_redis.call(...) end,
  pcall = function(...) check_keys(...) return server_redis.pcall(...) end,
}}, {{ __index = server_redis }})
"""


def check_declared_keys(
    monkeypatch: pytest.MonkeyPatch, *, changes: Iterable[tuple[str, str]] = (), allowed: Iterable[str] = ()
) -> set[str]:
    """Put the check before each script that is loaded from now on; return the set of scripts that have run.

    Args:
        changes: texts that a client replaces in scripts before it loads them.
        allowed: keys that a client's own additions to scripts touch.
    """
    ran: set[str] = set()
    names_of: dict[str, list[str]] = {}
    register, evalsha = redis.Redis.register_script, redis.Redis.evalsha
    texts = dict(SCRIPTS)
    for old, new in changes:
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    quoted = ", ".join(f"'{key}'" for key in allowed)

    def register_checked(client: redis.Redis, script: Any) -> Any:
        names = [name for name in SCRIPTS if SCRIPTS[name] in script or texts[name] in script]
        if not names:
            return register(client, script)
        registered = register(client, _PRELUDE.format(name=names[-1], allowed=quoted) + script)
        names_of[registered.sha] = names
        return registered

    def evalsha_noted(client: redis.Redis, sha: str, *arguments: Any) -> Any:
        reply = evalsha(client, sha, *arguments)
        ran.update(names_of.get(sha, ()))
        return reply

    monkeypatch.setattr(redis.Redis, "register_script", register_checked)
    monkeypatch.setattr(redis.Redis, "evalsha", evalsha_noted)
    return ran
