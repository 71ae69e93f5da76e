-- Takes up to `limit` messages from the lanes and records each under a lease, in one atomic step.
-- KEYS  claims, leases, attempts, counters, then 4 keys of the interactive lane, then 4 of the bulk lane
-- ARGV  token, limit, least number to take from bulk, lease in ms, prefix of the marks of answered ids
-- Reply server time in ms, then for each job: id, attempt, number of its lane key (1 to 8), message bytes
local claims, leases, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, limit, bulk_least = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_ms, done_prefix = tonumber(ARGV[4]), ARGV[5]
local FIRST, BULK, LAST = 5, 9, 12
local READABLE_BYTES = 4 * 1024 * 1024

-- A wrong type must stop the script before anything is popped: Redis does not undo a script.
redis.call('HLEN', claims)
redis.call('ZCARD', leases)
redis.call('HLEN', attempts)
redis.call('HLEN', counters)

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- '~' can't begin a valid id, so a message without one still has a place among the claims.
local function identity(raw)
  if #raw <= READABLE_BYTES then
    local ok, message = pcall(cjson.decode, raw)
    if ok and type(message) == 'table' and type(message.headers) == 'table' then
      local id = message.headers.id
      if type(id) == 'string' and #id <= 128 and string.find(id, '^%w[%w_.:-]*$') then
        return id
      end
    end
  end
  return '~' .. redis.sha1hex(raw)
end

local ids, raws, from, done_keys = {}, {}, {}, {}
local seen, dropped = {}, 0

local function take(first, last, want)
  local got = 0
  for k = first, last do
    if got >= want then break end
    local popped = redis.pcall('RPOP', KEYS[k], want - got)
    if popped and not popped.err then
      for _, raw in ipairs(popped) do
        got = got + 1
        local id = identity(raw)
        if seen[id] then
          dropped = dropped + 1
        else
          seen[id] = true
          ids[#ids + 1], raws[#raws + 1], from[#from + 1] = id, raw, k
          done_keys[#done_keys + 1] = done_prefix .. id
        end
      end
    end
  end
  return got
end

local got = take(BULK, LAST, math.min(bulk_least, limit))
got = got + take(FIRST, BULK - 1, limit - got)
take(BULK, LAST, limit - got)

local reply = { tostring(now) }
if #ids > 0 then
  local answered = redis.call('MGET', unpack(done_keys))
  local held = redis.call('HMGET', claims, unpack(ids))
  local tried = redis.call('HMGET', attempts, unpack(ids))
  local records, terms = {}, {}
  for i, id in ipairs(ids) do
    if answered[i] or held[i] then
      dropped = dropped + 1
      if answered[i] then redis.call('HDEL', attempts, id) end
    else
      local attempt = (tonumber(tried[i] or 0) or 0) + 1
      records[#records + 1] = id
      records[#records + 1] = token .. '|' .. attempt .. '|' .. KEYS[from[i]] .. '|' .. raws[i]
      terms[#terms + 1] = now + lease_ms
      terms[#terms + 1] = id
      reply[#reply + 1] = id
      reply[#reply + 1] = attempt
      reply[#reply + 1] = from[i] - FIRST + 1
      reply[#reply + 1] = raws[i]
    end
  end
  if #records > 0 then
    redis.call('HSET', claims, unpack(records))
    redis.call('ZADD', leases, unpack(terms))
  end
end
if dropped > 0 then redis.call('HINCRBY', counters, 'copies_dropped', dropped) end
return reply
