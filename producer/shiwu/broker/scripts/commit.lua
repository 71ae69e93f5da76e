-- Answers jobs, each once: stores the answer, announces it, appends it to the stream, and removes claim, lease and attempts.
-- KEYS  claims, leases, attempts, results stream, dead, dead answers, dead messages, counters, deadlines, canvas, canvas due,
--       delayed, delayed_messages, answers with pending callbacks, their expiry, histories, their expiry, key to which a results
--       stream is moved that takes no more entries, the 4 hashes of marks, then the result key of each job, which is also the
--       channel on which its answer is announced; where earlier versions may have run: then the key of each job's mark as they
--       know it
-- ARGV  result ttl in s, mark ttl in s, max dead letters, date, channel of answered jobs, how long callbacks are reserved for
--       the worker in ms,
--       then for each job: id, kind, answer, start of Celery's result for a failure, `lane key|raw message` where kind needs
--       it, mark, name of the claim where it is not the id
-- kind  S success, F failure or R revoked; then any of the letters below; then the job's generation where it is not 0
--       I no result is wanted
--       D becomes a dead letter
--       C has callbacks to send
--       A the writer does not hold the job: the message is looked up in the claims and the delayed jobs; where it is in a
--         lane, its claim finds the answer
--       N the message has no id, so no caller can look for its answer
--       P a Celery client waits for the answer, on a channel of all nodes; without effect on one server
-- An answer counts if its id is not answered and waits for an answer of this generation. Each requeue of a dead letter starts
-- a generation; until it is answered, its number is in the attempts, and afterwards in the mark (`mark#generation`). A writer
-- from outside means the current generation, and so does one whose claim has another name than the id. An answer of another
-- generation changes nothing and is counted as discarded.
-- Reply the ids whose answers were discarded. An earlier run of this same commit does not count as another answer
local claims, leases, attempts, results = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead, dead_answers, dead_messages, counters = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local deadlines, canvas, canvas_due = KEYS[9], KEYS[10], KEYS[11]
local result_ttl, done_ttl, max_dead, date = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
-- A channel is no key, so the client of a shard puts no prefix on it here; a keys' prefix is `{tag}:`.
local prefix = string.match(claims, '^{[^}]*}:')
local ended, reserved_ms = (prefix or '') .. ARGV[5], tonumber(ARGV[6])
local delayed, delayed_messages, pending_answers, pending_expiry = KEYS[12], KEYS[13], KEYS[14], KEYS[15]
local histories, histories_expiry, moved_stream = KEYS[16], KEYS[17], KEYS[18]
local FIRST, STEP = 7, 7
local MARKS, LAST_MARKS, RESULTS = 19, 22, 22 -- the last one is before the first result key
local JOBS = (#ARGV - FIRST + 1) / STEP
local OLD_MARKS = RESULTS + JOBS -- before the first one
local has_old = #KEYS > OLD_MARKS
local MARGIN_MS, PAIRS = 60 * 1000, 3000
local READABLE_BYTES = 4 * 1024 * 1024
local STATES = { S = 'SUCCESS', F = 'FAILURE', R = 'REVOKED' }

for _, ttl in ipairs({ result_ttl, done_ttl }) do
  if not string.find(ttl, '^[1-9]%d*$') or #ttl > 10 then return redis.error_reply('ERR expected a time in s, got ' .. ttl) end
end
-- A key of a wrong type must stop the script before the first answer is marked, because Redis does not undo a script.
-- Deadlines are an index that producers may write to; no answer depends on it.
for _, hash in ipairs({ claims, attempts, dead_answers, dead_messages, counters, canvas, delayed_messages }) do redis.call('HLEN', hash) end
local has_pending, has_histories = redis.call('HLEN', pending_answers) > 0, redis.call('HLEN', histories) > 0
for _, set in ipairs({ leases, dead, canvas_due, delayed, pending_expiry, histories_expiry }) do redis.call('ZCARD', set) end
redis.call('XLEN', results)
local deadline_count = redis.pcall('ZCARD', deadlines)
local has_deadlines = type(deadline_count) == 'number' and deadline_count > 0
local has_dead = redis.call('ZCARD', dead) > 0

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A value that is no number must not end the script: the counters are for information only.
local function count(name, by)
  if type(redis.pcall('HINCRBY', counters, name, by)) ~= 'number' then redis.pcall('HSET', counters, name, by) end
end

-- `lane key|raw message` of a job that the writer does not hold, or nil where the job is neither claimed nor delayed.
local function message_of(id)
  local record = redis.call('HGET', claims, id)
  if record then return string.match(record, '^[^|]*|%d+|(.*)$') end
  return redis.call('HGET', delayed_messages, id) or nil
end

-- In a cluster, PUBLISH sends to every node and SPUBLISH to the clients of this shard. One server has PUBLISH only.
local publish = prefix and 'SPUBLISH' or 'PUBLISH'
local function announce(key, kind, meta)
  redis.call(publish, key, meta)
  -- Celery's clients SUBSCRIBE. A writer from outside does not know who waits.
  if prefix and string.find(kind, '[AP]', 2) then redis.call('PUBLISH', key, meta) end
end

local function wants_no_result(message)
  if not message or #message > READABLE_BYTES then return false end
  local ok, read = pcall(cjson.decode, string.match(message, '^[^|]*|(.*)$'))
  return ok and type(read) == 'table' and type(read.headers) == 'table' and read.headers.ignore_result == true
end

local function store_result(key, id, kind, head, answer)
  local result = head == '' and answer or head .. ',"answer":' .. answer .. '}'
  -- An id may contain any character. The answer begins with the id as JSON: if it is unescaped there, it needs no escapes here.
  local quoted = '"' .. id .. '"'
  if string.sub(answer, 7, 8 + #id) ~= quoted then quoted = cjson.encode(id) end
  local meta = '{"status":"' .. STATES[string.sub(kind, 1, 1)] .. '","result":' .. result
    .. ',"traceback":null,"children":[],"date_done":"' .. date .. '","task_id":' .. quoted .. '}'
  redis.call('SET', key, meta, 'EX', result_ttl)
  announce(key, kind, meta)
end

-- Whether an earlier run of this same commit succeeded and only its reply was lost: then the mark is the same. A writer that
-- means the current generation does not know it after its first run.
local function is_repeated(kept, mark, kind, claim)
  if kept == mark then return true end
  return (claim ~= '' or string.find(kind, 'A', 2, true)) and string.gsub(kept, '#%d+$', '') == mark
end

-- Stores the callbacks of a message, which may be sent from a time on. No id contains the byte 255, which no UTF-8 text has.
local function keep_callbacks(id, generation, answer, message, due)
  local member = generation > 0 and id .. '\255' .. generation or id
  redis.call('HSET', canvas, member, #answer .. '|' .. answer .. message)
  redis.call('ZADD', canvas_due, due, member)
end

-- A foreign entry with the largest id that exists ends a stream. Such a stream is moved aside. pcall: a client may not.
local function append(id, answer, generation)
  local fields = { 'id', id, 'answer', answer }
  if generation > 0 then fields[5], fields[6] = 'generation', generation end
  local added = redis.pcall('XADD', results, '*', unpack(fields))
  if type(added) == 'table' and added.err and string.find(added.err, 'exhausted', 1, true) then
    redis.pcall('RENAME', results, moved_stream)
    added = redis.pcall('XADD', results, '*', unpack(fields))
  end
  if type(added) == 'table' and added.err then count('results_not_streamed', 1) end
end

-- The hash for marks that have to live for so long, and the time to live that it gets, or nil where it has one. A hash takes
-- marks for a third of that time. Where all of its marks have lived long enough it is emptied and used again.
local left_ms = {}
for k = MARKS, LAST_MARKS do left_ms[k] = redis.call('PTTL', KEYS[k]) end
local function hash_for_marks(ttl_ms)
  local whole_ms = math.ceil(ttl_ms * 4 / 3) + MARGIN_MS
  local fitting, free, longest
  for k = MARKS, LAST_MARKS do
    local left = left_ms[k] == -1 and MARGIN_MS + 1 or left_ms[k]
    if left <= MARGIN_MS then
      free = free or k
    else
      if left >= ttl_ms + MARGIN_MS and (not fitting or left < left_ms[fitting]) then fitting = k end
      if not longest or left > left_ms[longest] then longest = k end
    end
  end
  if fitting and (left_ms[fitting] <= whole_ms or not free) then return KEYS[fitting], nil end
  if free and left_ms[free] ~= -2 then redis.call('UNLINK', KEYS[free]) end
  return KEYS[free or longest], whole_ms
end

local ids, found, claimed, generations = {}, {}, nil, nil
for i = FIRST, #ARGV, STEP do
  local id, kind, claim = ARGV[i], ARGV[i + 1], ARGV[i + 6]
  ids[#ids + 1] = id
  if claim ~= '' then
    claimed = claimed or {}
    claimed[#ids] = claim
  end
  if kind ~= 'S' then
    if string.find(kind, 'A', 2, true) then found[id] = message_of(id) end
    local generation = tonumber(string.match(kind, '%d+$'))
    if generation then
      generations = generations or {}
      generations[#ids] = generation
    end
  end
end

local kept_marks, is_old_form, obsolete = {}, {}, nil
for k = MARKS, LAST_MARKS do
  if left_ms[k] ~= -2 then
    local marks = redis.call('HMGET', KEYS[k], unpack(ids))
    for n = 1, JOBS do kept_marks[n] = marks[n] or kept_marks[n] end
  end
end
-- Marks of a wrong type are none.
for n = 1, has_old and JOBS or 0 do
  local mark = not kept_marks[n] and redis.pcall('GET', KEYS[OLD_MARKS + n])
  if type(mark) == 'string' then kept_marks[n], is_old_form[n] = mark, true end
end

-- Finds answers of another generation than their id waits for. Where no job was requeued or retried, nothing is read.
local stale, held = nil, ids
if generations or redis.call('HLEN', attempts) > 0 then
  generations = generations or {}
  for n, id in ipairs(ids) do
    local current = tonumber(string.match(redis.call('HGET', attempts, id) or '', '^%d+/(%d+)')) or 0
    -- An earlier version requeued the job, and knew no other form of its mark.
    if kept_marks[n] and current > (tonumber(string.match(kept_marks[n], '#(%d+)$')) or 0) then
      kept_marks[n], obsolete = nil, obsolete or {}
      obsolete[#obsolete + 1] = id
    end
    if (claimed and claimed[n]) or string.find(ARGV[FIRST + (n - 1) * STEP + 1], 'A', 2, true) then
      generations[n] = current
    elseif (generations[n] or 0) ~= current and not kept_marks[n] then
      stale = stale or {}
      stale[n] = true
    end
  end
end
local removed = ids
if claimed or stale then
  held, removed = {}, {}
  for n, id in ipairs(ids) do
    if not (stale and stale[n]) then
      held[#held + 1] = claimed and claimed[n] or id
      removed[#removed + 1] = id
    end
  end
end

-- First come the writes that free memory: a full server refuses a script whose first write needs memory.
redis.call('ZREM', leases, '', unpack(held))
if #held > 0 then
  redis.call('HDEL', claims, unpack(held))
  redis.call('HDEL', attempts, unpack(held))
  if claimed then redis.call('HDEL', attempts, unpack(removed)) end
  if has_deadlines then redis.call('ZREM', deadlines, unpack(removed)) end
  if has_histories then
    redis.call('HDEL', histories, unpack(held))
    redis.call('ZREM', histories_expiry, unpack(held))
  end
end
for id in pairs(found) do
  redis.call('HDEL', delayed_messages, id)
  redis.call('ZREM', delayed, id)
end

-- All marks are written before the first answer.
if obsolete then
  for k = MARKS, LAST_MARKS do redis.call('HDEL', KEYS[k], unpack(obsolete)) end
end
local marks, is_first, marked, fields = {}, {}, {}, {}
for n, id in ipairs(ids) do
  local mark, generation = ARGV[FIRST + (n - 1) * STEP + 5], generations and generations[n] or 0
  marks[n] = generation > 0 and mark .. '#' .. generation or mark
  if not (stale and stale[n]) and not kept_marks[n] then
    if marked[id] then
      kept_marks[n] = marked[id]
    else
      marked[id], is_first[n] = marks[n], true
      fields[#fields + 1], fields[#fields + 2] = id, marks[n]
      if has_old then redis.call('SET', KEYS[OLD_MARKS + n], marks[n], 'EX', done_ttl) end
    end
  end
end
-- An answer without its message waits for it as long as the mark lets the message be dropped.
local marks_ms = done_ttl * 1000
if #fields > 0 then
  local hash, whole_ms = hash_for_marks(done_ttl * 1000)
  for at = 1, #fields, 2 * PAIRS do redis.call('HSET', hash, unpack(fields, at, math.min(at + 2 * PAIRS - 1, #fields))) end
  if whole_ms then redis.call('PEXPIRE', hash, whole_ms) end
  marks_ms = math.max(marks_ms, whole_ms or redis.call('PTTL', hash))
end

local again, first, superseded = {}, 0, has_dead and {} or nil
local streamed_bytes, dead_bytes = 0, 0
for i = FIRST, #ARGV, STEP do
  local id, kind, answer, head, raw = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local n = (i - FIRST) / STEP + 1
  local generation = generations and generations[n] or 0
  local kept = kept_marks[n]
  if stale and stale[n] then
    again[#again + 1] = id
  elseif is_first[n] then
    first = first + 1
    if string.find(kind, 'D', 2, true) then
      redis.call('ZADD', dead, now, id)
      redis.call('HSET', dead_answers, id, answer)
      redis.call('HSET', dead_messages, id, raw)
      dead_bytes = dead_bytes + #id + #answer + #raw
    elseif superseded then
      superseded[#superseded + 1] = id
    end
    if not string.find(kind, 'N', 2, true) then
      local is_from_outside = string.find(kind, 'A', 2, true)
      if is_from_outside and not found[id] then
        has_pending = true
        redis.call('HSET', pending_answers, id, answer)
        redis.call('ZADD', pending_expiry, now + marks_ms, id)
      end
      if not string.find(kind, 'I', 2, true) and not wants_no_result(found[id]) then
        store_result(KEYS[RESULTS + n], id, kind, head, answer)
      end
      if string.find(kind, 'C', 2, true) or found[id] then
        -- A writer from outside sends no callbacks, so any worker may send them now.
        keep_callbacks(id, generation, answer, found[id] or raw, is_from_outside and now or now + reserved_ms)
      end
      append(id, answer, generation)
      streamed_bytes = streamed_bytes + #id + #answer
    end
    if string.find(kind, 'A', 2, true) then redis.call(publish, ended, id) end
  elseif not is_repeated(kept, marks[n], kind, ARGV[i + 6]) then
    again[#again + 1] = id
    -- The claim could not see that the id of this message was answered. Its caller must still find an answer.
    local is_hidden = ARGV[i + 6] ~= '' or is_old_form[n]
    if is_hidden and not string.find(kind, 'I', 2, true) and redis.pcall('GET', KEYS[RESULTS + n]) == false then
      store_result(KEYS[RESULTS + n], id, kind, head, answer)
    end
    -- The job was answered without its message, which left its lane by a sweep and not by a claim.
    local pending = has_pending and string.find(kind, 'C', 2, true) and redis.call('HGET', pending_answers, id)
    if pending then
      keep_callbacks(id, tonumber(string.match(kept, '#(%d+)$')) or 0, pending, raw, now)
      redis.call('HDEL', pending_answers, id)
      redis.call('ZREM', pending_expiry, id)
    end
  end
end

-- The id has a newer answer, which a requeue of an older dead letter would delete.
if superseded and #superseded > 0 and redis.call('ZREM', dead, unpack(superseded)) > 0 then
  redis.call('HDEL', dead_answers, unpack(superseded))
  redis.call('HDEL', dead_messages, unpack(superseded))
end
local excess = redis.call('ZCARD', dead) - max_dead
if excess > 0 then
  local oldest = redis.call('ZPOPMIN', dead, math.min(excess, 1000))
  local gone = {}
  for i = 1, #oldest, 2 do gone[#gone + 1] = oldest[i] end
  redis.call('HDEL', dead_answers, unpack(gone))
  redis.call('HDEL', dead_messages, unpack(gone))
  count('dead_dropped', #gone)
end
count('answered', first)
if streamed_bytes > 0 then count('results_bytes', streamed_bytes) end
if dead_bytes > 0 then count('dead_bytes', dead_bytes) end
if #again > 0 then count('answers_discarded', #again) end
return again
