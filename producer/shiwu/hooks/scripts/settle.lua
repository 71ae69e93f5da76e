-- Ends a try of one delivery: it was made, is tried again later, or is given up. Also notes the health of its endpoint.
-- KEYS  those of records.lua, pending set of the endpoint
-- ARGV  endpoint, webhook id, number of the take, outcome (delivered, retry or dead), delay in ms, pause of the endpoint in ms,
--       whether the endpoint is disabled (1 or 0), reason, max dead deliveries, failed tries before this one
-- Reply 1, or 0 where the lease expired and another process took the delivery in the meantime
local pending, endpoint, id, take, outcome = KEYS[6], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local delay_ms, pause_ms, reason, max_dead = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[8], tonumber(ARGV[9])
redis.call('ZCARD', pending)
local field = endpoint .. '|' .. id
local record = redis.call('HGET', deliveries, field)
local created, failed, takes, payload = split(record or '')
local is_held = created ~= nil and takes == take
-- A caller that lost the reply repeats the call, which must not count the try twice.
if is_held and outcome == 'retry' and failed ~= tonumber(ARGV[10]) then return 1 end
if outcome == 'delivered' then
  redis.call('HDEL', deliveries, field)
  redis.call('ZREM', pending, id)
elseif is_held then
  record = join(created, failed + 1, takes, payload)
  if outcome == 'retry' then
    redis.call('HSET', deliveries, field, record)
    redis.call('ZADD', pending, now + delay_ms, id)
  else
    give_up(pending, endpoint, id, record, reason, max_dead)
  end
end
local state = read_health(endpoint)
if outcome == 'delivered' then
  if state.failures > 0 or state.not_before > 0 then
    state.failures, state.not_before = 0, 0
    write_health(endpoint, state)
  end
else
  state.failures = state.failures + 1
  if ARGV[7] == '1' then state.disabled = now end
  if pause_ms > 0 then state.not_before = math.max(state.not_before, now + pause_ms) end
  state.last, state.reason = now, reason
  write_health(endpoint, state)
end
note_due(pending, endpoint, state.not_before)
return is_held and 1 or 0
