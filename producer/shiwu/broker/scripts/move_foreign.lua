-- Moves values of a wrong type aside, which another program has written, because every script refuses such a key.
-- KEYS  keys of shiwu, the counters first
-- ARGV  prefix of moved values, how long they are kept in s, then the type of each key
-- Reply for each value that was moved: its key, its type, its new key
local counters, prefix, kept_s = KEYS[1], ARGV[1], ARGV[2]
local FIRST = 3
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply, moved = {}, 0
for i, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= ARGV[FIRST + i - 1] then
    local target = prefix .. key .. ':' .. string.format('%.0f', now)
    redis.call('RENAME', key, target)
    redis.call('EXPIRE', target, kept_s)
    reply[#reply + 1] = key
    reply[#reply + 1] = found
    reply[#reply + 1] = target
    moved = moved + 1
  end
end
if moved > 0 and type(redis.pcall('HINCRBY', counters, 'foreign_moved', moved)) ~= 'number' then
  redis.pcall('HSET', counters, 'foreign_moved', moved)
end
return reply
