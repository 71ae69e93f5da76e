-- Gives jobs back that this worker still holds: to the front of their lane, or after a delay.
-- What gives in good order and does not count keeps its attempt number. What counts without a delay was on a device that was
-- lost: that is a death, and from the second on the job is a suspect.
-- KEYS  claims, leases, attempts, delayed, parked, suspects
-- ARGV  token, deaths that make a suspect, then for each: id, delay in ms, '1' if the try counts
-- Reply how many were still ours
local claims, leases, attempts, delayed, parked = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local token, suspects, suspect_from = ARGV[1], KEYS[6], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local released = 0
for i = 3, #ARGV, 3 do
  local id, delay, counts = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2] == '1'
  local record = redis.call('HGET', claims, id)
  local owner, attempt, lane, raw
  if record then owner, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  if owner == token then
    -- First what frees memory: a server that is full denies a script that begins with a write that needs some.
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    local deaths = tonumber(string.match(redis.call('HGET', attempts, id) or '', ':(%d+)$') or 0)
    if counts and delay <= 0 then deaths = deaths + 1 end
    if delay > 0 then
      redis.call('HSET', parked, id, lane .. '|' .. raw)
      redis.call('ZADD', delayed, now + delay, id)
    elseif deaths >= suspect_from then
      redis.call('RPUSH', suspects, lane .. '|' .. raw)
    else
      redis.call('RPUSH', lane, raw)
    end
    if counts then redis.call('HSET', attempts, id, attempt .. ':' .. deaths) end
    released = released + 1
  end
end
return released
