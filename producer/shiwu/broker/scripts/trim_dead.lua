-- Drops the oldest dead letters until so many bytes are free.
-- KEYS  dead, dead answers, dead messages, counters      ARGV  bytes to free, max letters to drop in one call
-- Reply {letters dropped, bytes of them}
local dead, answers, messages, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local to_free, most = tonumber(ARGV[1]), tonumber(ARGV[2])
-- A key of a wrong type must stop the script before its first write, because Redis does not undo a script.
for _, hash in ipairs({ answers, messages }) do redis.call('HLEN', hash) end
local dropped, freed = 0, 0
while freed < to_free and dropped < most do
  local id = redis.call('ZPOPMIN', dead)[1]
  if not id then break end
  freed = freed + #id + #(redis.call('HGET', answers, id) or '') + #(redis.call('HGET', messages, id) or '')
  dropped = dropped + 1
  redis.call('HDEL', answers, id)
  redis.call('HDEL', messages, id)
end
if dropped > 0 then
  redis.pcall('HINCRBY', counters, 'dead_dropped', dropped)
  redis.pcall('HINCRBY', counters, 'dead_bytes', -freed)
end
return { dropped, freed }
