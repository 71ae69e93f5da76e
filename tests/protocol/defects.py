"""Guards of the scripts, each with what the script is without it: the explorer has to find every one."""

from __future__ import annotations

from typing import Final

DEFECTS: Final[dict[str, tuple[str, str, str]]] = {
    "a delayed retry counts as a worker death": (
        "release.lua",
        "if counts and delay <= 0 then",
        "if counts then",
    ),
    "releases by others are believed": ("release.lua", "if owner == token then", "if owner then"),
    "requeue puts messages at the front": (
        "requeue.lua",
        "redis.pcall('LPUSH', lane_keys[lane] or KEYS[BULK], raw)",
        "redis.pcall('RPUSH', lane_keys[lane] or KEYS[BULK], raw)",
    ),
    "requeue takes ids that are claimed": ("requeue.lua", "if record and not is_live then", "if record then"),
    "requeue starts no generation": ("requeue.lua", "generation_of(id, old_mark) + 1", "generation_of(id, old_mark)"),
    "requeue keeps the mark": (
        "requeue.lua",
        "for k = MARKS, LAST_MARKS do redis.call('HDEL', KEYS[k], id) end",
        "",
    ),
    "a sweep takes copies of claimed jobs": ("take_late.lua", "redis.call('HEXISTS', claims, id) == 0 and ", ""),
    "a sweep answers what it did not take": (
        "take_late.lua",
        "redis.call('LREM', lane, -1, raw) == 1",
        "redis.call('LREM', lane, -1, raw) >= 0",
    ),
    "a swept message counts as an attempt": (
        "maintain.lua",
        "local is_attempt = attempt ~= '0'",
        "local is_attempt = true",
    ),
    "leases end early": (
        "maintain.lua",
        "ipairs(due(leases, now))",
        "ipairs(due(leases, now + 40000))",
    ),
    "reaped jobs go to the back": (
        "maintain.lua",
        "redis.pcall('RPUSH', key, raw)",
        "redis.pcall('LPUSH', key, raw)",
    ),
    "quarantine after three deaths": ("maintain.lua", "deaths >= quarantine_from", "deaths > quarantine_from"),
    "generations are lost by a crash": (
        "maintain.lua",
        "attempt .. generation .. ':' .. deaths",
        "attempt .. ':' .. deaths",
    ),
    "leases stay long after the clock was set back": ("maintain.lua", "shorten(leases, max_lease_ms)", ""),
    "late answers of earlier generations count": (
        "commit.lua",
        "elseif (generations[n] or 0) ~= current and",
        "elseif false and",
    ),
    "an answered id is answered again": (
        "commit.lua",
        "if not (stale and stale[n]) and not kept_marks[n] then",
        "if not (stale and stale[n]) then",
    ),
    "marks have no end": ("commit.lua", "if whole_ms then", "if false then"),
    "a cancelled delayed job stays delayed": ("commit.lua", "redis.call('ZREM', delayed, id)", ""),
    "callbacks of jobs cancelled in their lane are lost": (
        "commit.lua",
        "redis.call('HSET', pending_answers, id, answer)",
        "redis.call('ZREM', pending_expiry, id)",
    ),
    "callbacks are kept by id alone": ("commit.lua", "generation > 0 and id .. '\\255' .. generation or id", "id"),
    "callbacks of swept messages are lost": ("commit.lua", "if pending then", "if false then"),
    "callbacks are deleted without comparison": (
        "drop_callbacks.lua",
        "if not record or redis.sha1hex(record) ~= ARGV[2] then return 0 end",
        "",
    ),
    "two senders take the same callbacks": (
        "take_callbacks.lua",
        "if reserved_until > now and reserved_until % 1 == 0 then",
        "if true then",
    ),
    "a reservation that was lost is renewed": ("hold_callbacks.lua", "== reservation then", "then"),
    "claims of answered ids": ("claim.lua", "if answered[i] or held[i] then", "if held[i] then"),
    "claims of claimed ids": ("claim.lua", "if answered[i] or held[i] then", "if answered[i] then"),
    "quarantined jobs beside others": (
        "claim.lua",
        "if holds_nothing and is_quarantine_turn then",
        "if is_quarantine_turn then",
    ),
    "others' leases are renewed": (
        "renew.lua",
        "if record and string.sub(record, 1, #token + 1) == token .. '|' then",
        "if record then",
    ),
    "a known job is revoked later": ("revoke.lua", " or redis.call('HEXISTS', delayed_messages, ARGV[i]) == 1", ""),
    "dead letters are dropped in part": ("drop.lua", "redis.call('HDEL', KEYS[3], unpack(ARGV))", ""),
}
"""What goes wrong → script, text in it, and what stands there instead."""
