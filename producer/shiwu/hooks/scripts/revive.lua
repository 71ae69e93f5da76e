-- Makes dead deliveries due again, with their webhook ids and no failed tries, and enables their endpoints.
-- KEYS  those of records.lua, then the pending set of each endpoint
-- ARGV  number of endpoints, their names, then for each delivery: number of its pending set, webhook id
-- Reply how many there were
local count, revived = tonumber(ARGV[1]), 0
for i = 6, #KEYS do redis.call('ZCARD', KEYS[i]) end
for i = 1, count do redis.call('HDEL', health, ARGV[1 + i]) end
for i = 2 + count, #ARGV, 2 do
  local number, id = tonumber(ARGV[i]), ARGV[i + 1]
  local pending, endpoint = KEYS[5 + number], ARGV[1 + number]
  local field = endpoint .. '|' .. id
  local kept = redis.call('HGET', dead_deliveries, field)
  local created, _, takes, payload = split(string.match(kept or '', '^[^|]*|(.*)$') or '')
  if created then
    redis.call('HDEL', dead_deliveries, field)
    redis.call('ZREM', dead, field)
    redis.call('HSET', deliveries, field, join(now, 0, takes, payload))
    redis.call('ZADD', pending, now, id)
    redis.call('ZADD', due, 'LT', now, endpoint)
    revived = revived + 1
  end
end
return revived
