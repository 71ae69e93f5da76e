-- Puts dead letters at the back of their lane, with the same id, a new attempt count and no answer.
-- KEYS  dead, dead answers, dead messages, attempts, counters      ARGV  prefix of marks, prefix of results, ids...
-- Reply the ids that were requeued
local dead, answers, messages, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local requeued = {}
-- A full server refuses a script whose first write needs memory: this write needs none.
redis.call('HDEL', attempts, '')
for i = 3, #ARGV do
  local id = ARGV[i]
  local record = redis.call('HGET', messages, id)
  local lane, raw
  if record then lane, raw = string.match(record, '^([^|]*)|(.*)$') end
  if raw and type(redis.pcall('LPUSH', lane, raw)) == 'number' then
    redis.call('DEL', ARGV[1] .. id, ARGV[2] .. id)
    redis.call('HDEL', attempts, id)
    redis.call('ZREM', dead, id)
    redis.call('HDEL', answers, id)
    redis.call('HDEL', messages, id)
    requeued[#requeued + 1] = id
  end
end
if #requeued > 0 then redis.call('HINCRBY', counters, 'requeued', #requeued) end
return requeued
