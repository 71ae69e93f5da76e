-- Releases jobs that this worker still holds: to the front of their lane, or after a delay.
-- A job whose attempt does not count keeps its attempt number. An attempt that counts without a delay was on a device that
-- was lost. That is a worker death, and from the second one on the job is quarantined.
-- A job whose record names another lane goes to bulk.
-- KEYS  claims, leases, attempts, delayed, messages of delayed jobs, quarantine, histories, their expiry, then 4 keys of each
--       lane, interactive first
-- ARGV  token, deaths that lead to quarantine, how long a history is kept in s, the names of the lane keys as records have them,
--       then for each job: id, delay in ms, '1' if the attempt counts, `code|stage` of what ended it, or '' if it was no attempt
-- Reply the number of jobs that this worker still held
local claims, leases, attempts, delayed, delayed_messages = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local token, quarantine, quarantine_after_deaths = ARGV[1], KEYS[6], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local histories, histories_expiry, history_ttl = KEYS[7], KEYS[8], tonumber(ARGV[3])
local MAX_ATTEMPTS_KEPT = 10
local BULK, LANES = 13, 8
local lane_keys = {}
for n = 1, LANES do lane_keys[ARGV[3 + n]] = KEYS[8 + n] end

-- Adds an earlier attempt to the history of the job, of which the last ones are kept.
local function note_attempt(id, line)
  local kept = redis.call('HGET', histories, id)
  local text = kept and kept .. '\n' .. line or line
  local _, lines = string.gsub(text, '\n', '')
  for _ = MAX_ATTEMPTS_KEPT, lines do text = string.match(text, '\n(.*)$') end
  redis.call('HSET', histories, id, text)
  redis.call('ZADD', histories_expiry, now + history_ttl * 1000, id)
end

-- A key of a wrong type must stop the script before the first claim is removed, because Redis does not undo a script.
for _, hash in ipairs({ claims, attempts, delayed_messages, histories }) do redis.call('HLEN', hash) end
for _, set in ipairs({ leases, delayed, histories_expiry }) do redis.call('ZCARD', set) end
redis.call('LLEN', quarantine)

local released = 0
for i = 4 + LANES, #ARGV, 4 do
  local id, delay, counts, ending = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2] == '1', ARGV[i + 3]
  local record = redis.call('HGET', claims, id)
  local owner, attempt, lane, raw
  if record then owner, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  if owner == token then
    -- A copy that waits for its announcement is no attempt of the job, whose id was answered.
    if attempt == '0' then counts, ending = false, '' end
    -- The first write frees memory: a server without free memory denies a script whose first write needs some.
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    local tried = redis.call('HGET', attempts, id)
    local deaths = tonumber(string.match(tried or '', ':(%d+)$') or 0)
    if counts and delay <= 0 then deaths = deaths + 1 end
    -- A lane of a wrong type takes no message until maintenance has moved its value aside.
    local lane_key = lane_keys[lane] or KEYS[BULK]
    local is_lane_usable = type(redis.pcall('LLEN', lane_key)) == 'number'
    if delay > 0 or (not is_lane_usable and deaths < quarantine_after_deaths) then
      delay = math.max(delay, 1)
      redis.call('HSET', delayed_messages, id, lane .. '|' .. raw)
      redis.call('ZADD', delayed, now + delay, id)
    elseif deaths >= quarantine_after_deaths then
      redis.call('RPUSH', quarantine, lane .. '|' .. raw)
    else
      redis.call('RPUSH', lane_key, raw)
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
