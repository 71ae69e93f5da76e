-- Moves values of a wrong type aside, which another program has written, because every script refuses such a key.
-- KEYS  keys of shiwu, the counters first, then for each of them the key to which its value is moved
-- ARGV  how long moved values are kept in s, then the type of each key
-- Reply for each value that was moved: its key, its type, its new key
local counters, kept_s = KEYS[1], ARGV[1]
local COUNT = #KEYS / 2
local reply, moved = {}, 0
for i = 1, COUNT do
  local key, target = KEYS[i], KEYS[COUNT + i]
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= ARGV[1 + i] then
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
