-- Gives jobs back that this worker still holds: to the front of their lane, or after a delay.
-- What gives in good order and does not count keeps its attempt number. What counts without a delay was on a device that was
-- lost: that is a death, and from the second on the job is a suspect.
-- KEYS  claims, leases, attempts, delayed, parked, suspects
-- ARGV  token, deaths that make a suspect, prefix of histories, how long a history is kept in s, then for each: id, delay in ms,
--       '1' if the try counts, `code|stage` of what ended it, or '' for what is no try
-- Reply how many were still ours
local claims, leases, attempts, delayed, parked = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local token, suspects, suspect_from = ARGV[1], KEYS[6], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local history_prefix, history_ttl = ARGV[3], ARGV[4]
local MOST_TRIES = 10

-- Adds an earlier try to the job's history, of which the last ones are kept.
local function note_try(id, line)
  local key = history_prefix .. id
  local kept = redis.pcall('GET', key)
  local text = type(kept) == 'string' and kept .. '\n' .. line or line
  local _, lines = string.gsub(text, '\n', '')
  for _ = MOST_TRIES, lines do text = string.match(text, '\n(.*)$') end
  redis.call('SET', key, text, 'EX', history_ttl)
end

local released = 0
for i = 5, #ARGV, 4 do
  local id, delay, counts, ending = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2] == '1', ARGV[i + 3]
  local record = redis.call('HGET', claims, id)
  local owner, attempt, lane, raw
  if record then owner, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  if owner == token then
    -- First what frees memory: a server that is full denies a script that begins with a write that needs some.
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    local tried = redis.call('HGET', attempts, id)
    local deaths = tonumber(string.match(tried or '', ':(%d+)$') or 0)
    if counts and delay <= 0 then deaths = deaths + 1 end
    if delay > 0 then
      redis.call('HSET', parked, id, lane .. '|' .. raw)
      redis.call('ZADD', delayed, now + delay, id)
    elseif deaths >= suspect_from then
      redis.call('RPUSH', suspects, lane .. '|' .. raw)
    else
      redis.call('RPUSH', lane, raw)
    end
    if counts then
      redis.call('HSET', attempts, id, attempt .. ':' .. deaths)
    elseif ending ~= '' and not tried then
      -- A claim looks for the history of those jobs only that have come back.
      redis.call('HSET', attempts, id, '0:0')
    end
    if ending ~= '' then
      note_try(id, attempt .. '|' .. ending .. '|' .. now .. '|' .. math.max(0, delay) .. '|' .. token)
    end
    released = released + 1
  end
end
return released
