-- Takes up to `limit` messages from the lanes and records each under a lease, in one atomic step.
-- Jobs whose workers died twice are suspects: one worker at a time takes them, one by one, while it holds nothing else, so
-- that the guilty one convicts itself alone. In between that worker takes a portion of usual jobs.
-- KEYS  claims, leases, attempts, counters, suspects, taker of suspects, revoked ids, our last claim, canvas, canvas due,
--       then 4 keys of each lane, interactive first
-- ARGV  token, limit, least number to take from bulk, lease in ms, prefix of the marks of answered ids, '1' if we hold nothing,
--       '1' if it is a suspect's turn, prefix of answers given aside
-- Reply server time in ms, 1 if we take suspects now, then for each job: id, attempt, deaths, number of its lane key (1 to 8),
--       message, 1 if Celery's revoke named it
local claims, leases, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local suspects, taker, revoked, last_claim = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local token, limit, bulk_least = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_ms, done_prefix, holds_nothing = tonumber(ARGV[4]), ARGV[5], ARGV[6] == '1'
local canvas, canvas_due, aside_prefix = KEYS[9], KEYS[10], ARGV[8]
local FIRST, BULK, LAST = 11, 15, 18
local READABLE_BYTES = 4 * 1024 * 1024

-- A wrong type must stop the script before anything is popped: Redis does not undo a script.
redis.call('HLEN', claims)
redis.call('ZCARD', leases)
redis.call('HLEN', attempts)
redis.call('HLEN', counters)
redis.call('HLEN', canvas)
redis.call('ZCARD', canvas_due)
local has_revoked = redis.call('ZCARD', revoked) > 0

-- A server that became a replica must say so, and one that is full denies a script that begins with a write that needs
-- memory: this one needs none and changes nothing.
redis.call('ZREM', leases, '')

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

local function note(raw, k)
  local id = identity(raw)
  if seen[id] then
    dropped = dropped + 1
  else
    seen[id] = true
    ids[#ids + 1], raws[#raws + 1], from[#from + 1] = id, raw, k
    done_keys[#done_keys + 1] = done_prefix .. id
  end
end

local function take(first, last, want)
  local got = 0
  for k = first, last do
    if got >= want then break end
    local popped = redis.pcall('RPOP', KEYS[k], want - got)
    if popped and not popped.err then
      for _, raw in ipairs(popped) do
        got = got + 1
        note(raw, k)
      end
    end
  end
  return got
end

local alone, is_suspect = 0, false
if redis.call('LLEN', suspects) > 0 then
  local holder = redis.call('GET', taker)
  if not holder or holder == token then
    alone = 1
    redis.call('SET', taker, token, 'PX', math.max(1, lease_ms))
    if holds_nothing and ARGV[7] == '1' then
      is_suspect = true
      local lane, raw = string.match(redis.call('RPOP', suspects), '^([^|]*)|(.*)$')
      local from_key = FIRST
      for k = FIRST, LAST do
        if KEYS[k] == lane then from_key = k end
      end
      note(raw, from_key)
    end
  end
end
if alone == 0 or (holds_nothing and not is_suspect) then
  local got = take(BULK, LAST, math.min(bulk_least, limit))
  got = got + take(FIRST, BULK - 1, limit - got)
  take(BULK, LAST, limit - got)
end

local reply = { tostring(now), alone }
if #ids > 0 then
  local answered = redis.call('MGET', unpack(done_keys))
  local held = redis.call('HMGET', claims, unpack(ids))
  local tried = redis.call('HMGET', attempts, unpack(ids))
  local unwanted = has_revoked and redis.call('ZMSCORE', revoked, unpack(ids)) or {}
  local records, terms = {}, {}
  for i, id in ipairs(ids) do
    if answered[i] or held[i] then
      dropped = dropped + 1
      if answered[i] then
        redis.call('HDEL', attempts, id)
        -- Whoever answered it did not have its message, which may carry callbacks.
        local answer = redis.pcall('GET', aside_prefix .. id)
        if type(answer) == 'string' then
          redis.call('HSET', canvas, id, #answer .. '|' .. answer .. KEYS[from[i]] .. '|' .. raws[i])
          redis.call('ZADD', canvas_due, now, id)
          redis.call('DEL', aside_prefix .. id)
        end
      end
    else
      local attempt = (tonumber(string.match(tried[i] or '', '^%d+') or 0)) + 1
      local deaths = tonumber(string.match(tried[i] or '', ':(%d+)$') or 0)
      records[#records + 1] = id
      records[#records + 1] = token .. '|' .. attempt .. '|' .. KEYS[from[i]] .. '|' .. raws[i]
      terms[#terms + 1] = now + lease_ms
      terms[#terms + 1] = id
      reply[#reply + 1] = id
      reply[#reply + 1] = attempt
      reply[#reply + 1] = deaths
      reply[#reply + 1] = from[i] - FIRST + 1
      reply[#reply + 1] = raws[i]
      reply[#reply + 1] = unwanted[i] and 1 or 0
    end
  end
  if #records > 0 then
    redis.call('HSET', claims, unpack(records))
    redis.call('ZADD', leases, unpack(terms))
    redis.call('SET', last_claim, table.concat(ids, ' '), 'PX', math.max(1, lease_ms))
  end
end
if dropped > 0 then redis.call('HINCRBY', counters, 'copies_dropped', dropped) end
return reply
