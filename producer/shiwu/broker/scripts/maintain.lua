-- What anybody does for all: jobs whose lease ended and jobs whose delay is over go back to the front of their lane, jobs
-- whose workers died twice to the suspects; old dead letters go; jobs that ran out of time are named.
-- KEYS  claims, leases, attempts, delayed, parked, counters, workers, suspects, deadlines, dead, dead answers, dead messages,
--       results stream, revoked ids, then the keys of the lanes
-- ARGV  worker name or '', most jobs of each kind, '1' to count the lanes, deaths that make a suspect, longest lease in ms,
--       age of dead letters in ms, prefix of histories, how long a history is kept in s
-- Reply {reaped, promoted, suspects, waiting in all lanes, length of the results stream, ids out of time, server time in ms}
local claims, leases, attempts, delayed, parked, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local workers, suspects, deadlines = KEYS[7], KEYS[8], KEYS[9]
local dead, dead_answers, dead_messages, results = KEYS[10], KEYS[11], KEYS[12], KEYS[13]
local LANES = 15
local name, most, is_counting, suspect_from = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4])
local longest_ms, dead_age_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local history_prefix, history_ttl = ARGV[7], ARGV[8]
local MOST_TRIES = 10
local FORGET_WORKER_MS = 3600 * 1000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

redis.call('ZREMRANGEBYSCORE', workers, '-inf', now - FORGET_WORKER_MS)
redis.call('ZREMRANGEBYSCORE', KEYS[14], '-inf', now)
if name ~= '' then redis.call('ZADD', workers, now, name) end

-- pcall: a lane key of a wrong type keeps its jobs where they are, and holds up nobody else.
local function put_back(lane, raw)
  local pushed = redis.pcall('RPUSH', lane, raw)
  return type(pushed) == 'number'
end

-- Adds an earlier try to the job's history, of which the last ones are kept.
local function note_try(id, line)
  local key = history_prefix .. id
  local kept = redis.pcall('GET', key)
  local text = type(kept) == 'string' and kept .. '\n' .. line or line
  local _, lines = string.gsub(text, '\n', '')
  for _ = MOST_TRIES, lines do text = string.match(text, '\n(.*)$') end
  redis.call('SET', key, text, 'EX', history_ttl)
end

-- A server clock that was set back would leave the jobs of the dead under leases without end.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, now + longest_ms + 1, '+inf', 'LIMIT', 0, most)) do
  redis.call('ZADD', leases, now + longest_ms, id)
end

local reaped = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, most)) do
  local record = redis.call('HGET', claims, id)
  local token, attempt, lane, raw
  if record then token, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  local deaths = tonumber(string.match(redis.call('HGET', attempts, id) or '', ':(%d+)$') or 0) + 1
  local is_back = not raw
  if raw and deaths >= suspect_from then
    is_back = put_back(suspects, lane .. '|' .. raw)
  elseif raw then
    is_back = put_back(lane, raw)
  end
  if is_back then
    if raw then
      redis.call('HSET', attempts, id, attempt .. ':' .. deaths)
      note_try(id, attempt .. '|worker_lost||' .. now .. '|0|' .. token)
      reaped = reaped + 1
    end
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
  end
end

local promoted = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, most)) do
  local record = redis.call('HGET', parked, id)
  local lane, raw
  if record then lane, raw = string.match(record, '^([^|]*)|(.*)$') end
  if not raw or put_back(lane, raw) then
    if raw then promoted = promoted + 1 end
    redis.call('HDEL', parked, id)
    redis.call('ZREM', delayed, id)
  end
end

local old = redis.call('ZRANGEBYSCORE', dead, '-inf', now - dead_age_ms, 'LIMIT', 0, most)
if #old > 0 then
  redis.call('ZREM', dead, unpack(old))
  redis.call('HDEL', dead_answers, unpack(old))
  redis.call('HDEL', dead_messages, unpack(old))
end

local suspected = redis.call('LLEN', suspects)
local waiting = suspected
for k = is_counting and LANES or #KEYS + 1, #KEYS do
  local length = redis.pcall('LLEN', KEYS[k])
  if type(length) == 'number' then waiting = waiting + length end
end
if reaped > 0 then redis.call('HINCRBY', counters, 'reaped', reaped) end
local late = redis.call('ZRANGEBYSCORE', deadlines, '-inf', now, 'LIMIT', 0, most)
return { reaped, promoted, suspected, waiting, redis.call('XLEN', results), late, now }
