-- The beginning of every script here: keys, the clock, and the forms of records. See contract/keys.py.
-- KEYS  deliveries, due, health, dead, dead deliveries, then those of the script
local deliveries, due, health, dead, dead_deliveries = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
-- A key of a wrong type must stop a script before its first write, because Redis does not undo a script.
for _, hash in ipairs({ deliveries, health, dead_deliveries }) do redis.call('HLEN', hash) end
for _, set in ipairs({ due, dead }) do redis.call('ZCARD', set) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function integer(number) return string.format('%.0f', number) end

-- created in ms, failed tries, takes, payload
local function split(record)
  local created, failed, takes, payload = string.match(record, '^(%d+)|(%d+)|(%d+)|(.*)$')
  return tonumber(created), tonumber(failed), tonumber(takes), payload
end

local function join(created, failed, takes, payload)
  return integer(created) .. '|' .. integer(failed) .. '|' .. integer(takes) .. '|' .. payload
end

local function read_health(endpoint)
  local text = redis.call('HGET', health, endpoint) or '0|0|0|0|'
  local failures, not_before, disabled, last, reason = string.match(text, '^(%d+)|(%d+)|(%d+)|(%d+)|(.*)$')
  return { failures = tonumber(failures) or 0, not_before = tonumber(not_before) or 0, disabled = tonumber(disabled) or 0,
    last = tonumber(last) or 0, reason = reason or '' }
end

local function write_health(endpoint, state)
  local numbers = { integer(state.failures), integer(state.not_before), integer(state.disabled), integer(state.last) }
  redis.call('HSET', health, endpoint, table.concat(numbers, '|') .. '|' .. state.reason)
end

-- Moves a delivery to the dead ones, of which the oldest are dropped.
local function give_up(pending, endpoint, id, record, reason, max_dead)
  local field = endpoint .. '|' .. id
  redis.call('ZREM', pending, id)
  redis.call('HDEL', deliveries, field)
  redis.call('HSET', dead_deliveries, field, reason .. '|' .. record)
  redis.call('ZADD', dead, now, field)
  local excess = redis.call('ZCARD', dead) - max_dead
  if excess > 0 then
    local oldest = redis.call('ZPOPMIN', dead, math.min(excess, 1000))
    for i = 1, #oldest, 2 do redis.call('HDEL', dead_deliveries, oldest[i]) end
  end
end

-- Notes when to look at an endpoint next. Requests can name any number of URLs, so the health of their origins is forgotten
-- where no delivery waits.
local function note_due(pending, endpoint, not_before)
  local first = redis.call('ZRANGE', pending, 0, 0, 'WITHSCORES')
  if #first == 0 then
    redis.call('ZREM', due, endpoint)
    if string.find(endpoint, '://', 1, true) then redis.call('HDEL', health, endpoint) end
  else
    redis.call('ZADD', due, integer(math.max(tonumber(first[2]), not_before)), endpoint)
  end
end
