-- Gives claimed jobs back: to the front of their lane, to the delayed set, or, accused again of an end, to the suspects.
-- KEYS  claims, leases, attempts, delayed, parked, suspects
-- ARGV  token, attempts that make a suspect, then for each job: id, delay in ms (0: at once), '1' if the attempt counts
-- Reply how many were still this worker's to give
local claims, leases, attempts, delayed, parked, token = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1]
local suspects, suspect_from = KEYS[6], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local released = 0
for i = 3, #ARGV, 3 do
  local id, delay = ARGV[i], tonumber(ARGV[i + 1])
  local record = redis.call('HGET', claims, id)
  local owner, attempt, lane, raw
  if record then owner, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  if owner == token then
    if delay > 0 then
      redis.call('HSET', parked, id, lane .. '|' .. raw)
      redis.call('ZADD', delayed, now + delay, id)
    elseif ARGV[i + 2] == '1' and tonumber(attempt) >= suspect_from then
      redis.call('RPUSH', suspects, lane .. '|' .. raw)
    else
      redis.call('RPUSH', lane, raw)
    end
    if ARGV[i + 2] == '1' then redis.call('HSET', attempts, id, attempt) end
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    released = released + 1
  end
end
return released
