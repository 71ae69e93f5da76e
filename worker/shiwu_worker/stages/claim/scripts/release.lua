-- Releases jobs that this worker still holds: to the front of their lane, or after a delay.
-- A job whose attempt does not count keeps its attempt number. An attempt that counts without a delay was on a device that
-- was lost. That is a worker death, and from the second one on the job is quarantined.
-- KEYS  claims, leases, attempts, delayed, messages of delayed jobs, quarantine
-- ARGV  token, deaths that lead to quarantine, prefix of histories, how long a history is kept in s, then for each job: id,
--       delay in ms, '1' if the attempt counts, `code|stage` of what ended it, or '' if it was no attempt
-- Reply the number of jobs that this worker still held
local claims, leases, attempts, delayed, delayed_messages = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local token, quarantine, quarantine_after_deaths = ARGV[1], KEYS[6], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local history_prefix, history_ttl = ARGV[3], ARGV[4]
local MAX_ATTEMPTS_KEPT = 10

-- Adds an earlier attempt to the history of the job, of which the last ones are kept.
local function note_attempt(id, line)
  local key = history_prefix .. id
  local kept = redis.pcall('GET', key)
  local text = type(kept) == 'string' and kept .. '\n' .. line or line
  local _, lines = string.gsub(text, '\n', '')
  for _ = MAX_ATTEMPTS_KEPT, lines do text = string.match(text, '\n(.*)$') end
  redis.call('SET', key, text, 'EX', history_ttl)
end

-- A key of a wrong type must stop the script before the first claim is removed, because Redis does not undo a script.
for _, hash in ipairs({ claims, attempts, delayed_messages }) do redis.call('HLEN', hash) end
for _, set in ipairs({ leases, delayed }) do redis.call('ZCARD', set) end
redis.call('LLEN', quarantine)

local released = 0
for i = 5, #ARGV, 4 do
  local id, delay, counts, ending = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2] == '1', ARGV[i + 3]
  local record = redis.call('HGET', claims, id)
  local owner, attempt, lane, raw
  if record then owner, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  if owner == token then
    -- The first write frees memory: a server without free memory denies a script whose first write needs some.
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    local tried = redis.call('HGET', attempts, id)
    local deaths = tonumber(string.match(tried or '', ':(%d+)$') or 0)
    if counts and delay <= 0 then deaths = deaths + 1 end
    -- A lane of a wrong type takes no message until maintenance has moved its value aside.
    local is_lane_usable = type(redis.pcall('LLEN', lane)) == 'number'
    if delay > 0 or (not is_lane_usable and deaths < quarantine_after_deaths) then
      delay = math.max(delay, 1)
      redis.call('HSET', delayed_messages, id, lane .. '|' .. raw)
      redis.call('ZADD', delayed, now + delay, id)
    elseif deaths >= quarantine_after_deaths then
      redis.call('RPUSH', quarantine, lane .. '|' .. raw)
    else
      redis.call('RPUSH', lane, raw)
    end
    if counts then
      redis.call('HSET', attempts, id, attempt .. (string.match(tried or '', '^%d+(/%d+)') or '') .. ':' .. deaths)
    elseif ending ~= '' and not tried then
      -- A claim reads the history only of jobs that have an entry here.
      redis.call('HSET', attempts, id, '0:0')
    end
    if ending ~= '' then
      note_attempt(id, attempt .. '|' .. ending .. '|' .. now .. '|' .. math.max(0, delay) .. '|' .. token)
    end
    released = released + 1
  end
end
return released
