-- Takes answered jobs whose Celery callbacks are to be sent. They are reserved for this worker for a while.
-- KEYS  canvas, canvas due      ARGV  how long to reserve in ms, max jobs, then ids of this worker's answers; without ids:
-- jobs whose reservation by any worker has ended
-- Reply for each job: id, `length of the answer|answer, lane key|message bytes`
local canvas, due = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}

-- First comes a write that needs no memory: a full server refuses a script whose first write needs memory.
redis.call('ZREM', due, '')

local function take(id)
  local record = redis.call('HGET', canvas, id)
  if record then
    redis.call('ZADD', due, now + tonumber(ARGV[1]), id)
    reply[#reply + 1] = id
    reply[#reply + 1] = record
  else
    redis.call('ZREM', due, id)
  end
end

if #ARGV > 2 then
  for i = 3, #ARGV do
    local reserved_until = redis.call('ZSCORE', due, ARGV[i])
    if reserved_until and tonumber(reserved_until) > now then take(ARGV[i]) end
  end
else
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, tonumber(ARGV[2]))) do take(id) end
end
return reply
