-- Renews the leases of jobs that this worker still holds.
-- KEYS  claims, leases      ARGV  token, lease in ms, ids...      Reply the ids that it no longer holds
local claims, leases, token = KEYS[1], KEYS[2], ARGV[1]
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
local lost = {}
redis.call('HLEN', claims)
-- A server without free memory denies a script whose first write needs memory; this one needs none.
redis.call('ZREM', leases, '')
for i = 3, #ARGV do
  local record = redis.call('HGET', claims, ARGV[i])
  if record and string.sub(record, 1, #token + 1) == token .. '|' then
    redis.call('ZADD', leases, ends, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
