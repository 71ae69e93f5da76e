-- Maintenance for all workers. Jobs whose lease expired or whose delay is over return to the front of their lane, or to the
-- quarantine after two worker deaths. A claim of attempt 0 was no attempt, so its return does not count as one. Old dead letters
-- are removed, and histories and pending answers that are too old. A record that names another lane goes to bulk.
-- Claimed and delayed messages are returned whose entry in the deadlines is due. An entry is only an index, which
-- producers may write: the caller answers a job if the message itself has a deadline that has passed. An entry without a
-- claimed or delayed message is removed, and lanes and quarantine are to be looked through, by one process at a time.
-- KEYS  claims, leases, attempts, delayed, delayed messages, counters, workers, quarantine, deadlines, dead, dead answers, dead messages,
--       results stream, revoked ids, owner of the quarantine, canvas due, wanted scan, owner of the scan, answers with pending
--       callbacks, their expiry, histories, their expiry, the 4 hashes of marks, then 4 keys of each lane, interactive first
-- ARGV  worker name or '', max jobs of each kind, '1' to count the lanes, worker deaths before quarantine, max lease in ms,
--       max age of dead letters in ms, how long a history is kept in s, max time in ms for which callbacks are reserved, token,
--       when this process began the last scan that it has finished in ms, how long a scan is owned in ms, the names of the lane
--       keys as records have them
-- Reply {reaped, promoted, quarantined, waiting in all lanes, length of the results stream, entries of deadlines that were due,
--       server time in ms, bytes counted for the results stream, and for the dead letters, 1 if this process is to scan,
--       {id and `lane key|message` of each message whose entry was due}}
local claims, leases, attempts, delayed, delayed_messages, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local workers, quarantine, deadlines = KEYS[7], KEYS[8], KEYS[9]
local dead, dead_answers, dead_messages, results = KEYS[10], KEYS[11], KEYS[12], KEYS[13]
local quarantine_owner, canvas_due = KEYS[15], KEYS[16]
local scan_wanted, scan_owner = KEYS[17], KEYS[18]
local pending_answers, pending_expiry, histories, histories_expiry = KEYS[19], KEYS[20], KEYS[21], KEYS[22]
local MARKS, LAST_MARKS, LANES, BULK = 23, 26, 27, 31
local MARKS_MARGIN_MS = 60 * 1000 -- as in commit.lua
local name, limit, is_counting, quarantine_from = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4])
local max_lease_ms, dead_age_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local history_ms, max_reserved_ms = tonumber(ARGV[7]) * 1000, tonumber(ARGV[8])
local token, scanned_ms, scan_owned_ms = ARGV[9], tonumber(ARGV[10]), ARGV[11]
local NAMES = 12
local lane_keys = {}
for k = LANES, #KEYS do lane_keys[ARGV[NAMES + k - LANES]] = KEYS[k] end
local MAX_MESSAGE, MAX_REPLY = 1024 * 1024, 8 * 1024 * 1024
local MAX_ATTEMPTS_KEPT = 10
local WORKER_TTL_MS = 3600 * 1000
local RETRY_MS, NEW_LEASE_MS = 10 * 1000, 60 * 1000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A key of a wrong type must stop the script before its first write, because Redis does not undo a script.
-- Of keys that do not exist nothing else is read: a queue without jobs costs the server few commands.
local hashes = { claims, attempts, delayed_messages, dead_answers, dead_messages, pending_answers, histories }
local sets = { leases, delayed, dead, canvas_due, pending_expiry, histories_expiry, KEYS[14] }
local size = { [KEYS[14]] = 0 }
local looked_at = { quarantine, quarantine_owner, deadlines, scan_wanted }
for _, keys in ipairs({ hashes, sets }) do
  for _, key in ipairs(keys) do
    size[key] = 0
    looked_at[#looked_at + 1] = key
  end
end
local is_empty = redis.call('EXISTS', unpack(looked_at)) == 0
local stream_length, quarantined, wanted_ms = redis.call('XLEN', results), 0, false
if not is_empty then
  for _, hash in ipairs(hashes) do size[hash] = redis.call('HLEN', hash) end
  for _, set in ipairs(sets) do size[set] = redis.call('ZCARD', set) end
  quarantined, wanted_ms = redis.call('LLEN', quarantine), redis.call('GET', scan_wanted)
end

-- The first write of all: a wrong type of this key stops the script here.
redis.call('ZREMRANGEBYSCORE', workers, '-inf', now - WORKER_TTL_MS)
if size[KEYS[14]] > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[14], '-inf', now) end
if name ~= '' then redis.call('ZADD', workers, now, name) end

-- pcall: if a lane key has a wrong type, its jobs stay where they are, and are tried again after others.
local function put_back(key, raw)
  local pushed = redis.pcall('RPUSH', key, raw)
  return type(pushed) == 'number'
end

-- Adds an attempt to the history of a job, of which the last ones are kept.
local function add_attempt(id, line)
  local kept = redis.call('HGET', histories, id)
  local text = kept and kept .. '\n' .. line or line
  local _, lines = string.gsub(text, '\n', '')
  for _ = MAX_ATTEMPTS_KEPT, lines do text = string.match(text, '\n(.*)$') end
  redis.call('HSET', histories, id, text)
  redis.call('ZADD', histories_expiry, now + history_ms, id)
end

-- A server may end a large key by its time to live in one long step, so a hash whose marks are old is removed before.
for k = MARKS, LAST_MARKS do
  local left_ms = redis.call('PTTL', KEYS[k])
  if left_ms >= 0 and left_ms <= MARKS_MARGIN_MS then redis.call('UNLINK', KEYS[k]) end
end

-- If the server's clock was set back, jobs of crashed workers would stay under their leases for too long, and so would
-- callbacks under their reservation, and the quarantine under its owner.
local function shorten(set, longest_ms)
  if size[set] == 0 then return end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', set, now + longest_ms + 1, '+inf', 'LIMIT', 0, limit)) do
    redis.call('ZADD', set, now + longest_ms, id)
  end
end
shorten(leases, max_lease_ms)
shorten(canvas_due, max_reserved_ms)
local owned_ms = not is_empty and redis.pcall('PTTL', quarantine_owner)
if type(owned_ms) == 'number' and (owned_ms == -1 or owned_ms > max_lease_ms) then
  redis.pcall('PEXPIRE', quarantine_owner, max_lease_ms)
end

-- A message whose entry in the sorted set was removed by another program would wait without end, and so would what is kept
-- for a time only.
local function complete(hash, set, at)
  if size[hash] <= size[set] then return end
  local ids = redis.pcall('HKEYS', hash)
  for _, id in ipairs(ids) do redis.call('ZADD', set, 'NX', at, id) end
  size[set] = size[hash]
end
complete(claims, leases, now + NEW_LEASE_MS)
complete(delayed_messages, delayed, now)
complete(pending_answers, pending_expiry, now + history_ms)
complete(histories, histories_expiry, now + history_ms)

-- Up to `limit` members of a sorted set whose time is before this one.
local function due(set, until_ms)
  return size[set] > 0 and redis.call('ZRANGEBYSCORE', set, '-inf', until_ms, 'LIMIT', 0, limit) or {}
end

local reaped = 0
for _, id in ipairs(due(leases, now)) do
  local record = redis.call('HGET', claims, id)
  local token, attempt, lane, raw
  if record then token, attempt, lane, raw = string.match(record, '^([^|]*)|(%d+)|([^|]*)|(.*)$') end
  local is_attempt = attempt ~= '0'
  local tried = redis.call('HGET', attempts, id) or ''
  local deaths = tonumber(string.match(tried, ':(%d+)$') or 0) + (is_attempt and 1 or 0)
  local is_back = not raw
  if raw and deaths >= quarantine_from then
    is_back = put_back(quarantine, lane .. '|' .. raw)
  elseif raw then
    is_back = put_back(lane_keys[lane] or KEYS[BULK], raw)
  end
  if is_back then
    if raw and is_attempt then
      local generation = string.match(tried, '^%d+(/%d+)') or ''
      redis.call('HSET', attempts, id, attempt .. generation .. ':' .. deaths)
      add_attempt(id, attempt .. '|worker_lost||' .. now .. '|0|' .. token)
    end
    if raw then reaped = reaped + 1 end
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
  else
    redis.call('ZADD', leases, now + RETRY_MS, id)
  end
end

local promoted = 0
for _, id in ipairs(due(delayed, now)) do
  local record = redis.call('HGET', delayed_messages, id)
  local lane, raw
  if record then lane, raw = string.match(record, '^([^|]*)|(.*)$') end
  if not raw or put_back(lane_keys[lane] or KEYS[BULK], raw) then
    if raw then promoted = promoted + 1 end
    redis.call('HDEL', delayed_messages, id)
    redis.call('ZREM', delayed, id)
  else
    redis.call('ZADD', delayed, now + RETRY_MS, id)
  end
end

local old = due(dead, now - dead_age_ms)
if #old > 0 then
  redis.call('ZREM', dead, unpack(old))
  redis.call('HDEL', dead_answers, unpack(old))
  redis.call('HDEL', dead_messages, unpack(old))
end
for hash, expiry in pairs({ [pending_answers] = pending_expiry, [histories] = histories_expiry }) do
  local over = due(expiry, now)
  if #over > 0 then
    redis.call('HDEL', hash, unpack(over))
    redis.call('ZREM', expiry, unpack(over))
  end
end

-- Jobs of crashed workers may have been added above.
if reaped > 0 then quarantined = redis.call('LLEN', quarantine) end
local waiting = quarantined
for k = is_counting and LANES or #KEYS + 1, #KEYS do
  local length = redis.pcall('LLEN', KEYS[k])
  if type(length) == 'number' then waiting = waiting + length end
end
-- A value that is no number must not end the script: the counters are for information only.
if reaped > 0 and type(redis.pcall('HINCRBY', counters, 'reaped', reaped)) ~= 'number' then
  redis.pcall('HSET', counters, 'reaped', reaped)
end

-- pcall: producers may write to this key, so it may have a wrong type.
local late, late_bytes, due_count = {}, 0, 0
for _, id in ipairs(is_empty and {} or redis.pcall('ZRANGEBYSCORE', deadlines, '-inf', now, 'LIMIT', 0, limit)) do
  if late_bytes > MAX_REPLY then break end
  due_count = due_count + 1
  local record = redis.call('HGET', claims, id)
  record = record and string.match(record, '^[^|]*|%d+|(.*)$') or redis.call('HGET', delayed_messages, id)
  if record and #record < MAX_MESSAGE then
    late_bytes = late_bytes + #record
    late[#late + 1] = id
    late[#late + 1] = record
  else
    redis.call('ZREM', deadlines, id)
    if not record then
      redis.call('SET', scan_wanted, now)
      wanted_ms = now
    end
  end
end

local is_scanning = 0
if wanted_ms and (tonumber(wanted_ms) or 0) <= scanned_ms then
  redis.call('DEL', scan_wanted)
elseif wanted_ms then
  local holder = redis.pcall('GET', scan_owner)
  if not holder or holder == token then
    redis.call('SET', scan_owner, token, 'PX', scan_owned_ms)
    is_scanning = 1
  end
end

-- pcall: with counters of a wrong type nothing is dropped by its bytes until they have been moved aside.
local counted = redis.pcall('HMGET', counters, 'results_bytes', 'dead_bytes')
local function whole(value) return type(value) == 'string' and math.floor(tonumber(value) or 0) or 0 end
local stream_bytes, dead_bytes = whole(counted[1]), whole(counted[2])
return { reaped, promoted, quarantined, waiting, stream_length, due_count, now, stream_bytes, dead_bytes, is_scanning, late }
