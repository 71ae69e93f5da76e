-- What any worker does for all: jobs whose lease ended and jobs whose delay is over go back to the front of their lane.
-- KEYS  claims, leases, attempts, delayed, parked, counters, workers      ARGV  worker name, most jobs of each kind
-- Reply {reaped, promoted}
local claims, leases, attempts, delayed, parked = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local most = tonumber(ARGV[2])
local FORGET_WORKER_MS = 3600 * 1000

redis.call('ZADD', KEYS[7], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', now - FORGET_WORKER_MS)

-- pcall: a lane key of a wrong type keeps its jobs where they are, and holds up nobody else.
local function put_back(lane, raw)
  local pushed = redis.pcall('RPUSH', lane, raw)
  return type(pushed) == 'number'
end

local reaped = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, most)) do
  local record = redis.call('HGET', claims, id)
  local attempt, lane, raw
  if record then attempt, lane, raw = string.match(record, '^[^|]*|(%d+)|([^|]*)|(.*)$') end
  if not raw or put_back(lane, raw) then
    if raw then
      redis.call('HSET', attempts, id, attempt)
      reaped = reaped + 1
    end
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
  end
end

local promoted = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, most)) do
  local record = redis.call('HGET', parked, id)
  local lane, raw
  if record then lane, raw = string.match(record, '^([^|]*)|(.*)$') end
  if not raw or put_back(lane, raw) then
    if raw then promoted = promoted + 1 end
    redis.call('HDEL', parked, id)
    redis.call('ZREM', delayed, id)
  end
end

if reaped > 0 then redis.call('HINCRBY', KEYS[6], 'reaped', reaped) end
return { reaped, promoted }
