-- Answers jobs, each once: stores the answer, announces it, appends it to the stream, and removes claim, lease and attempts.
-- KEYS  claims, leases, attempts, results stream, dead, dead answers, dead messages, counters, deadlines, canvas, canvas due,
--       delayed, delayed_messages
-- ARGV  result ttl in s, mark ttl in s, max dead letters, date, prefix of marks, prefix of results, channel of answered jobs,
--       how long callbacks are reserved for the worker in ms, prefix of answers with pending callbacks, prefix of histories,
--       then for each job: id, kind, answer, start of Celery's result for a failure, `lane key|raw message` where kind needs
--       it, mark, name of the claim where it is not the id
-- kind  S success, F failure or R revoked; then any of
--       I no result is wanted
--       D becomes a dead letter
--       C has callbacks to send
--       A the writer does not hold the job: the message is looked up in the claims and the delayed jobs; where it is in a
--         lane, its claim finds the answer
--       N the message has no id, so no caller can look for its answer
--       H has a history of earlier attempts, which the answer contains
-- Reply the ids that were answered before, except by an earlier run of this same commit
local claims, leases, attempts, results = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, dead_answers, dead_messages, counters = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local deadlines, canvas, canvas_due = KEYS[9], KEYS[10], KEYS[11]
local result_ttl, done_ttl, max_dead, date = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local done_prefix, result_prefix, ended, reserved_ms = ARGV[5], ARGV[6], ARGV[7], tonumber(ARGV[8])
local delayed, delayed_messages, pending_prefix, history_prefix = KEYS[12], KEYS[13], ARGV[9], ARGV[10]
local FIRST, STEP = 11, 7
local READABLE_BYTES = 4 * 1024 * 1024
local STATES = { S = 'SUCCESS', F = 'FAILURE', R = 'REVOKED' }

-- A key of a wrong type must stop the script before the first answer is marked, because Redis does not undo a script.
for _, hash in ipairs({ claims, attempts, dead_answers, dead_messages, counters, canvas, delayed_messages }) do redis.call('HLEN', hash) end
for _, set in ipairs({ leases, dead, canvas_due, delayed }) do redis.call('ZCARD', set) end
redis.call('XLEN', results)
local has_deadlines = redis.call('ZCARD', deadlines) > 0

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- `lane key|raw message` of a job that the writer does not hold, or nil where the job is neither claimed nor delayed.
local function message_of(id)
  local record = redis.call('HGET', claims, id)
  if record then return string.match(record, '^[^|]*|%d+|(.*)$') end
  return redis.call('HGET', delayed_messages, id) or nil
end

local function wants_no_result(message)
  if not message or #message > READABLE_BYTES then return false end
  local ok, read = pcall(cjson.decode, string.match(message, '^[^|]*|(.*)$'))
  return ok and type(read) == 'table' and type(read.headers) == 'table' and read.headers.ignore_result == true
end

local function store_result(id, kind, head, answer)
  local key, result = result_prefix .. id, head == '' and answer or head .. ',"answer":' .. answer .. '}'
  -- An id may contain any character. The answer begins with the id as JSON: if it is unescaped there, it needs no escapes here.
  local quoted = '"' .. id .. '"'
  if string.sub(answer, 7, 8 + #id) ~= quoted then quoted = cjson.encode(id) end
  local meta = '{"status":"' .. STATES[string.sub(kind, 1, 1)] .. '","result":' .. result
    .. ',"traceback":null,"children":[],"date_done":"' .. date .. '","task_id":' .. quoted .. '}'
  redis.call('SET', key, meta, 'EX', result_ttl)
  redis.call('PUBLISH', key, meta)
end

local ids, found, claimed, histories = {}, {}, nil, {}
for i = FIRST, #ARGV, STEP do
  local id, kind, claim = ARGV[i], ARGV[i + 1], ARGV[i + 6]
  ids[#ids + 1] = id
  if claim ~= '' then
    claimed = claimed or {}
    claimed[#ids] = claim
  end
  if kind ~= 'S' then
    if string.find(kind, 'A', 2, true) then found[id] = message_of(id) end
    if string.find(kind, '[AH]', 2) then histories[#histories + 1] = history_prefix .. (claim ~= '' and claim or id) end
  end
end
-- First come the writes that free memory: a full server refuses a script whose first write needs memory.
for n, id in ipairs(claimed and ids or {}) do claimed[n] = claimed[n] or id end
claimed = claimed or ids
redis.call('HDEL', claims, unpack(claimed))
redis.call('ZREM', leases, unpack(claimed))
redis.call('HDEL', attempts, unpack(claimed))
if #histories > 0 then redis.call('DEL', unpack(histories)) end
for id in pairs(found) do
  redis.call('HDEL', delayed_messages, id)
  redis.call('ZREM', delayed, id)
end
if has_deadlines then redis.call('ZREM', deadlines, unpack(ids)) end

local again, first = {}, 0
for i = FIRST, #ARGV, STEP do
  local id, kind, answer, head, raw, mark = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
  if redis.call('SET', done_prefix .. id, mark, 'NX', 'EX', done_ttl) then
    first = first + 1
    if string.find(kind, 'D', 2, true) then
      redis.call('ZADD', dead, now, id)
      redis.call('HSET', dead_answers, id, answer)
      redis.call('HSET', dead_messages, id, raw)
    end
    if not string.find(kind, 'N', 2, true) then
      local is_from_outside = string.find(kind, 'A', 2, true)
      if is_from_outside and not found[id] then redis.call('SET', pending_prefix .. id, answer, 'EX', done_ttl) end
      if not string.find(kind, 'I', 2, true) and not wants_no_result(found[id]) then
        store_result(id, kind, head, answer)
      end
      if string.find(kind, 'C', 2, true) or found[id] then
        redis.call('HSET', canvas, id, #answer .. '|' .. answer .. (found[id] or raw))
        -- A writer from outside sends no callbacks, so any worker may send them now.
        redis.call('ZADD', canvas_due, is_from_outside and now or now + reserved_ms, id)
      end
      redis.call('XADD', results, '*', 'id', id, 'answer', answer)
    end
    if string.find(kind, 'A', 2, true) then redis.call('PUBLISH', ended, id) end
  elseif redis.call('GET', done_prefix .. id) ~= mark then
    -- The same mark means that an earlier run of this commit succeeded and only its reply was lost.
    again[#again + 1] = id
    -- The claim could not see that the id of this message was answered. Its caller must still find an answer.
    if ARGV[i + 6] ~= '' and not string.find(kind, 'I', 2, true) and redis.pcall('GET', result_prefix .. id) == false then
      store_result(id, kind, head, answer)
    end
  end
end

local excess = redis.call('ZCARD', dead) - max_dead
if excess > 0 then
  local oldest = redis.call('ZPOPMIN', dead, math.min(excess, 1000))
  local gone = {}
  for i = 1, #oldest, 2 do gone[#gone + 1] = oldest[i] end
  redis.call('HDEL', dead_answers, unpack(gone))
  redis.call('HDEL', dead_messages, unpack(gone))
  redis.call('HINCRBY', counters, 'dead_dropped', #gone)
end
redis.call('HINCRBY', counters, 'answered', first)
if #again > 0 then redis.call('HINCRBY', counters, 'answers_discarded', #again) end
return again
