-- Celery's revoke names ids of anybody's tasks. Those that are known to be ours are the caller's to answer; the others are
-- remembered for a while, in case they wait in a lane, and answered when they are claimed.
-- KEYS  claims, parked, revoked      ARGV  how long in ms, most to remember, ids...
-- Reply how many remembered ids were forgotten because there are too many, then the ids known to be jobs of shiwu
local claims, parked, revoked = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ours = {}
-- First what frees memory: a server that is full denies a script that begins with a write that needs some.
redis.call('ZREMRANGEBYSCORE', revoked, '-inf', now)
for i = 3, #ARGV do
  if redis.call('HEXISTS', claims, ARGV[i]) == 1 or redis.call('HEXISTS', parked, ARGV[i]) == 1 then
    ours[#ours + 1] = ARGV[i]
  else
    redis.call('ZADD', revoked, now + tonumber(ARGV[1]), ARGV[i])
  end
end
table.insert(ours, 1, redis.call('ZREMRANGEBYRANK', revoked, 0, -1 - tonumber(ARGV[2])))
return ours
