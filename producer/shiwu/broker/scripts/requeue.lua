-- Gives dead letters a new life: a fresh attempt count, no answer, the same id, the back of the lane they came from.
-- KEYS  dead, dead answers, dead messages, attempts, counters      ARGV  prefix of marks, prefix of results, ids...
-- Reply the ids that went back
local dead, answers, messages, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local back = {}
-- A server that is full denies a script that begins with a write that needs memory: this one needs none.
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
    back[#back + 1] = id
  end
end
if #back > 0 then redis.call('HINCRBY', counters, 'requeued', #back) end
return back
