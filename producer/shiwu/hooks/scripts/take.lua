-- Takes deliveries of one endpoint that are due, under a lease, and gives up those that are too old.
-- KEYS  those of records.lua, pending set of the endpoint
-- ARGV  endpoint, how many at most, lease in ms, failures in a row after which one is tried alone, pause between such tries in
--       ms, age in ms at which a delivery is given up, max dead deliveries
-- Reply webhook id, record, … of the deliveries taken
local pending, endpoint, wanted, lease_ms = KEYS[6], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local alone_after, alone_every_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
local max_age_ms, max_dead = tonumber(ARGV[6]), tonumber(ARGV[7])
local MOST, UNWANTED_PAUSE_MS = 200, 60000
redis.call('ZCARD', pending)
local state = read_health(endpoint)
local is_failing = state.failures >= alone_after
local limit = wanted
if state.disabled > 0 or state.not_before > now then
  limit = 0
elseif is_failing then
  limit = math.min(wanted, 1)
end
local taken = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', pending, '-inf', now, 'LIMIT', 0, MOST)) do
  -- Behind a limit only those are looked for that are too old, which a healthy endpoint does not have.
  if limit > 0 and #taken / 2 >= limit and state.failures == 0 then break end
  local record = redis.call('HGET', deliveries, endpoint .. '|' .. id)
  local created, failed, takes, payload = split(record or '')
  if not created then
    redis.call('ZREM', pending, id)
    redis.call('HDEL', deliveries, endpoint .. '|' .. id)
  elseif state.disabled > 0 then
    give_up(pending, endpoint, id, record, 'endpoint_disabled', max_dead)
  elseif now - created > max_age_ms then
    give_up(pending, endpoint, id, record, 'too_old', max_dead)
  elseif #taken / 2 < limit then
    record = join(created, failed, takes + 1, payload)
    redis.call('HSET', deliveries, endpoint .. '|' .. id, record)
    redis.call('ZADD', pending, now + lease_ms, id)
    taken[#taken + 1] = id
    taken[#taken + 1] = record
  end
end
if is_failing and #taken > 0 then
  state.not_before = now + alone_every_ms
  write_health(endpoint, state)
end
note_due(pending, endpoint, wanted == 0 and now + UNWANTED_PAUSE_MS or state.not_before)
return taken
