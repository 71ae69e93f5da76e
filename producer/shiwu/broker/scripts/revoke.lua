-- Celery's revoke may name ids of any task. The caller answers those that are known jobs of shiwu. The others are remembered
-- for a while, because they may wait in a lane, and are answered when they are claimed.
-- KEYS  claims, delayed_messages, revoked      ARGV  how long to remember in ms, max ids to remember, ids...
-- Reply how many remembered ids were dropped because there are too many, then the ids of known jobs
local claims, delayed_messages, revoked = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = {}
redis.call('HLEN', claims)
redis.call('HLEN', delayed_messages)
-- First comes a write that frees memory: a full server refuses a script whose first write needs memory.
redis.call('ZREMRANGEBYSCORE', revoked, '-inf', now)
for i = 3, #ARGV do
  if redis.call('HEXISTS', claims, ARGV[i]) == 1 or redis.call('HEXISTS', delayed_messages, ARGV[i]) == 1 then
    known[#known + 1] = ARGV[i]
  else
    redis.call('ZADD', revoked, now + tonumber(ARGV[1]), ARGV[i])
  end
end
table.insert(known, 1, redis.call('ZREMRANGEBYRANK', revoked, 0, -1 - tonumber(ARGV[2])))
return known
