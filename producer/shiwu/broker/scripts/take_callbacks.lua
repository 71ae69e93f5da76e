-- Takes answered jobs whose Celery callbacks are to be sent. They are reserved for this sender for a while.
-- A member of the canvas is a job id, followed by a byte 255 and the generation if the dead letter was requeued.
-- The score of a member in `canvas due` is when its reservation ends, in ms: a whole number where the commit reserved it for
-- the worker that answered, and half a ms more where a sender took it, so that only one sender takes what a commit reserved.
-- KEYS  canvas, canvas due      ARGV  how long to reserve in ms, max jobs, then members of this worker's answers; without
-- members: jobs whose reservation by any worker has ended
-- Reply the reservation, as `hold_callbacks` needs it, then for each job: member, `length of the answer|answer, lane
-- key|message bytes`
local canvas, due = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reservation = string.format('%.1f', now + tonumber(ARGV[1]) + 0.5)
local reply = { reservation }
redis.call('HLEN', canvas)

-- First comes a write that needs no memory: a full server refuses a script whose first write needs memory.
redis.call('ZREM', due, '')

local function take(member)
  local record = redis.call('HGET', canvas, member)
  if record then
    redis.call('ZADD', due, reservation, member)
    reply[#reply + 1] = member
    reply[#reply + 1] = record
  else
    redis.call('ZREM', due, member)
  end
end

if #ARGV > 2 then
  for i = 3, #ARGV do
    local reserved_until = tonumber(redis.call('ZSCORE', due, ARGV[i]) or 0)
    if reserved_until > now and reserved_until % 1 == 0 then take(ARGV[i]) end
  end
else
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, tonumber(ARGV[2]))) do take(member) end
end
return reply
