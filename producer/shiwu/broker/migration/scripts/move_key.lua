-- Moves a portion of a key to its new name. What is under both names already keeps its value under the new one.
-- KEYS  old name, new name      ARGV  type, max fields, members or items
-- Reply {how many were moved, how many are left, how many of them were under the new name already}
local old, new, kind, most = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2])
local SIZE = { hash = 'HLEN', zset = 'ZCARD', list = 'LLEN' }
local found = redis.call('TYPE', old).ok
if found == 'none' then return { 0, 0, 0 } end
if found ~= kind then return redis.error_reply('WRONGTYPE expected a ' .. kind .. ' at ' .. old .. ', got a ' .. found) end
local size = redis.call(SIZE[kind], old)
if redis.call('RENAMENX', old, new) == 1 then return { size, 0, 0 } end
-- A key of a wrong type must stop the script before its first write, because Redis does not undo a script.
redis.call(SIZE[kind], new)
local moved, kept = 0, 0
if kind == 'hash' then
  for _, field in ipairs(redis.call('HRANDFIELD', old, most)) do
    local is_new = redis.call('HSETNX', new, field, redis.call('HGET', old, field)) == 1
    redis.call('HDEL', old, field)
    moved, kept = moved + 1, kept + (is_new and 0 or 1)
  end
elseif kind == 'zset' then
  local members = redis.call('ZRANGE', old, 0, most - 1, 'WITHSCORES')
  for i = 1, #members, 2 do
    local is_new = redis.call('ZADD', new, 'NX', members[i + 1], members[i]) == 1
    redis.call('ZREM', old, members[i])
    moved, kept = moved + 1, kept + (is_new and 0 or 1)
  end
else
  -- A claim takes from the right, so the oldest items go there, in their order.
  while moved < most and redis.call('LMOVE', old, new, 'LEFT', 'RIGHT') do moved = moved + 1 end
end
return { moved, redis.call(SIZE[kind], old), kept }
