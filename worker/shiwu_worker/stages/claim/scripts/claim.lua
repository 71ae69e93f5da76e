-- Claims up to `limit` messages, and about 512 KiB of each lane, and records each under a lease, in one atomic step.
-- Jobs whose workers died twice are quarantined. One worker at a time owns the quarantine and claims its jobs one by one,
-- while it holds nothing else, so that the job that ends workers is identified. In between it claims ordinary jobs.
-- A message of such a job that is found in a lane, after a delay or because it was sent again, is moved to the quarantine.
-- The key of the last claim holds `number|ids`. A claim whose number is not above it claims nothing: its worker has given it
-- up (`end_claims`), and would not know its jobs.
-- A copy of a message whose id was answered is dropped. Where its client may wait, the copy is held as a claim of attempt 0
-- instead, and named in the reply: the worker announces the answer with `answer_duplicates`, which ends the claim.
-- KEYS  claims, leases, attempts, counters, quarantine, owner of the quarantine, revoked ids, this worker's last claim,
--       canvas, canvas due, deadlines, answers with pending callbacks, their expiry, histories,
--       the 4 hashes of marks of answered ids, then 4 keys of each lane, interactive first
-- ARGV  token, limit, least number to claim from bulk, lease in ms, '1' if this worker holds nothing, '1' if it is the
--       quarantine's turn, '1' if interactive is served, '1' if bulk is, most to claim from bulk, worker deaths before
--       quarantine, number of this claim, the names of the lane keys as records have them
-- Reply server time in ms, 1 if this worker owns the quarantine now, ids of the copies that it holds, then for each job: id,
--       attempt, deaths, number of its lane key (1 to 8), message, 1 if Celery's revoke named it, history of earlier attempts
--       or '', generation: how often the id was requeued as a dead letter
local claims, leases, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local quarantine, owner, revoked, last_claim = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local canvas, canvas_due, deadlines = KEYS[9], KEYS[10], KEYS[11]
local pending_answers, pending_expiry, histories = KEYS[12], KEYS[13], KEYS[14]
local token, limit, bulk_least = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_ms, holds_nothing, is_quarantine_turn = tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6] == '1'
local serves_interactive, serves_bulk = ARGV[7] == '1', ARGV[8] == '1'
local bulk_most, quarantine_from, number = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local NAMES = 11 -- before the name of the first lane key
local MARKS, LAST_MARKS = 15, 18
local FIRST, BULK, LAST = 19, 23, 26
local READABLE_BYTES = 256 * 1024
local BODY_BYTES = 8 * 1024
local MAX_ID_BYTES = 255
local MAX_WHOLE = 2 ^ 53
local LAST_CLAIM_KEPT_MS = 600 * 1000
local LANE_BYTES = 512 * 1024
local FIRST_PORTION = 4 -- of the largest messages, 1 MiB

-- A wrong type must stop the script before anything is popped: Redis does not undo a script.
redis.call('HLEN', claims)
redis.call('ZCARD', leases)
redis.call('HLEN', attempts)
redis.call('HLEN', counters)
redis.call('HLEN', canvas)
redis.call('ZCARD', canvas_due)
redis.call('HLEN', histories)
local has_marks = {}
for k = MARKS, LAST_MARKS do has_marks[k] = redis.call('HLEN', KEYS[k]) > 0 end
redis.call('ZCARD', pending_expiry)
local has_pending = redis.call('HLEN', pending_answers) > 0
local has_revoked = redis.call('ZCARD', revoked) > 0
local quarantined = redis.call('LLEN', quarantine)
local holder = quarantined > 0 and redis.call('GET', owner)

-- A server that became a replica must fail here. A server without free memory denies a script whose first write needs
-- memory; this write needs none and changes nothing.
redis.call('ZREM', leases, '')

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local last_number = tonumber(string.match(redis.call('GET', last_claim) or '', '^(%d+)|'))
if last_number and number <= last_number then return { tostring(now), 0, {} } end

local DIGITS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
local digit_of

-- The decoded text, or nil if it is not base64.
local function decode_base64(text)
  local out, n, byte, char, floor = {}, 0, string.byte, string.char, math.floor
  if not digit_of then
    digit_of = {}
    for i = 1, #DIGITS do digit_of[byte(DIGITS, i)] = i - 1 end
  end
  for i = 1, #text, 4 do
    local a, b, c, d = byte(text, i, i + 3)
    a, b, c, d = digit_of[a], digit_of[b], digit_of[c], digit_of[d]
    if not (a and b) then return nil end
    local bits = a * 262144 + b * 4096 + (c or 0) * 64 + (d or 0)
    n = n + 1
    out[n] = string.sub(char(floor(bits / 65536), floor(bits / 256) % 256, bits % 256), 1, d and 3 or c and 2 or 1)
  end
  return table.concat(out)
end

local UTF_8 = {
  '[\194-\223][\128-\191]', '\224[\160-\191][\128-\191]', '[\225-\236\238\239][\128-\191][\128-\191]',
  '\237[\128-\159][\128-\191]', '\240[\144-\191][\128-\191][\128-\191]',
  '[\241-\243][\128-\191][\128-\191][\128-\191]', '\244[\128-\143][\128-\191][\128-\191]',
}
local function is_utf8(text)
  for _, sequence in ipairs(UTF_8) do text = string.gsub(text, sequence, '?') end
  return not string.find(text, '[\128-\255]')
end

local function as_table(value) return type(value) == 'table' and value or {} end
local function is_absent(id) return id == '' or (type(id) ~= 'string' and type(id) ~= 'number') end

-- The id in a body of task protocol 1, or nil if the body has none; and whether that is known.
local function id_in_body(message)
  local body, is_base64 = message.body, as_table(message.properties).body_encoding == 'base64'
  if type(body) ~= 'string' then return nil, true end
  if as_table(message.headers).compression then return nil, false end
  local head = string.sub(body, 1, 16)
  if is_base64 then head = decode_base64(head) or '' end
  if not string.find(head, '^%s*{') then return nil, true end
  if #body > BODY_BYTES then return nil, false end
  local is_read, fields = pcall(cjson.decode, is_base64 and decode_base64(body) or body)
  return as_table(is_read and fields).id, is_read
end

-- The id as it is used in keys, or nil if it cannot be used.
local function usable(id)
  if type(id) == 'number' then
    return id == math.floor(id) and id > -MAX_WHOLE and id < MAX_WHOLE and string.format('%d', id) or nil
  end
  if #id > MAX_ID_BYTES or (#id == 41 and string.find(id, '^~[0-9a-f]+$')) then return nil end
  return (not string.find(id, '[\128-\255]') or is_utf8(id)) and id or nil
end

-- The id of a message if it has unusual characters, or is not in the headers.
local function unusual_id(message)
  local id, is_known = as_table(message.headers).id, true
  if is_absent(id) then
    id, is_known = id_in_body(message)
    if is_absent(id) then id = as_table(message.properties).correlation_id end
  end
  return is_known and not is_absent(id) and usable(id) or nil
end

-- The id under which the client of the message waits for the answer, as `shiwu.broker.message_reader` finds it. A message
-- whose id is not found here is claimed under its digest; its worker searches the id again and stores the answer there.
-- Also returns whether no client waits for a result, and by when the job must have an answer.
local function identity(raw)
  local is_read, message = false, nil
  if #raw <= READABLE_BYTES then is_read, message = pcall(cjson.decode, raw) end
  if is_read and type(message) == 'table' then
    local headers = message.headers
    local id = type(headers) == 'table' and headers.id
    if type(id) ~= 'string' or #id > MAX_ID_BYTES or not string.find(id, '^%w[%w_.:-]*$') then
      id = unusual_id(message)
    end
    headers = as_table(headers)
    if id then return id, headers.ignore_result == true, headers.shiwu_answer_by_ms end
  end
  return '~' .. redis.sha1hex(raw), true
end

-- The name of a lane key in records, whatever prefix a client puts before its keys.
local function lane_name(k) return ARGV[NAMES + k - FIRST + 1] end

local ids, raws, from, has_no_client = {}, {}, {}, {}
local seen, dropped, answer_by_ms = {}, 0, {}

local function note(raw, k)
  local id, no_client, answer_by = identity(raw)
  if seen[id] then
    dropped = dropped + 1
  else
    seen[id] = true
    ids[#ids + 1], raws[#raws + 1], from[#from + 1] = id, raw, k
    if no_client then has_no_client[#ids] = true end
    if type(answer_by) == 'number' and answer_by > 0 and answer_by < MAX_WHOLE then answer_by_ms[#ids] = answer_by end
  end
end

-- Takes up to `want` messages, and stops after LANE_BYTES: a worker reads its messages one after the other, so a claim of
-- large bulk messages would delay the interactive jobs that come next. Returns how many it took, and true after LANE_BYTES.
local function take(first, last, want)
  local got, bytes, portion = 0, 0, FIRST_PORTION
  for k = first, last do
    local popped
    repeat
      portion = math.min(portion, want - got)
      popped = portion > 0 and redis.pcall('RPOP', KEYS[k], portion)
      if popped and not popped.err then
        for _, raw in ipairs(popped) do
          got, bytes = got + 1, bytes + #raw
          note(raw, k)
        end
        if bytes >= LANE_BYTES then return got, true end
        portion = math.ceil((LANE_BYTES - bytes) * got / bytes)
      end
    until not popped or popped.err
  end
  return got, false
end

local owns_quarantine, is_isolated = 0, false
if quarantined > 0 then
  if not holder or holder == token then
    owns_quarantine = 1
    redis.call('SET', owner, token, 'PX', math.max(1, lease_ms))
    if holds_nothing and is_quarantine_turn then
      is_isolated = true
      local lane, raw = string.match(redis.call('RPOP', quarantine), '^([^|]*)|(.*)$')
      local from_key = BULK
      for k = FIRST, LAST do
        if lane_name(k) == lane then from_key = k end
      end
      if raw then note(raw, from_key) end
    end
  end
end
if owns_quarantine == 0 or (holds_nothing and not is_isolated) then
  local bulk, interactive, is_bulk_full = 0, 0, not serves_bulk
  if serves_bulk then bulk, is_bulk_full = take(BULK, LAST, math.min(bulk_most, serves_interactive and bulk_least or limit)) end
  if serves_interactive then interactive = take(FIRST, BULK - 1, limit - bulk) end
  if not is_bulk_full then take(BULK, LAST, math.min(bulk_most, limit - interactive) - bulk) end
end

local duplicates = {}
local reply = { tostring(now), owns_quarantine, duplicates }
if #ids > 0 then
  local answered = {}
  for k = MARKS, LAST_MARKS do
    local marks = has_marks[k] and redis.call('HMGET', KEYS[k], unpack(ids))
    for i = 1, marks and #ids or 0 do answered[i] = marks[i] or answered[i] end
  end
  local held = redis.call('HMGET', claims, unpack(ids))
  local tried = redis.call('HMGET', attempts, unpack(ids))
  local unwanted = has_revoked and redis.call('ZMSCORE', revoked, unpack(ids)) or {}
  local records, terms, ends = {}, {}, {}
  for i, id in ipairs(ids) do
    -- An earlier version requeued the job, and knew no other form of its mark.
    local generation = tried[i] and answered[i] and tonumber(string.match(tried[i], '^%d+/(%d+)'))
    if generation and generation > (tonumber(string.match(answered[i], '#(%d+)$')) or 0) then answered[i] = nil end
    if answered[i] or held[i] then
      dropped = dropped + 1
      if answered[i] then
        redis.call('HDEL', attempts, id)
        if not has_no_client[i] and not held[i] then
          duplicates[#duplicates + 1] = id
          records[#records + 1] = id
          records[#records + 1] = token .. '|0|' .. lane_name(from[i]) .. '|' .. raws[i]
          terms[#terms + 1] = now + lease_ms
          terms[#terms + 1] = id
        end
        -- The job was answered without its message, which may have callbacks.
        local answer = has_pending and redis.call('HGET', pending_answers, id)
        if answer then
          local generation = string.match(answered[i], '#(%d+)$')
          local member = generation and id .. '\255' .. generation or id
          redis.call('HSET', canvas, member, #answer .. '|' .. answer .. lane_name(from[i]) .. '|' .. raws[i])
          redis.call('ZADD', canvas_due, now, member)
          redis.call('HDEL', pending_answers, id)
          redis.call('ZREM', pending_expiry, id)
        end
      end
    elseif tried[i] and not is_isolated and tonumber(string.match(tried[i], ':(%d+)$') or 0) >= quarantine_from then
      redis.call('LPUSH', quarantine, lane_name(from[i]) .. '|' .. raws[i])
    else
      local attempt = (tonumber(string.match(tried[i] or '', '^%d+') or 0)) + 1
      local deaths = tonumber(string.match(tried[i] or '', ':(%d+)$') or 0)
      records[#records + 1] = id
      records[#records + 1] = token .. '|' .. attempt .. '|' .. lane_name(from[i]) .. '|' .. raws[i]
      terms[#terms + 1] = now + lease_ms
      terms[#terms + 1] = id
      if answer_by_ms[i] then
        ends[#ends + 1] = string.format('%.3f', answer_by_ms[i])
        ends[#ends + 1] = id
      end
      reply[#reply + 1] = id
      reply[#reply + 1] = attempt
      reply[#reply + 1] = deaths
      reply[#reply + 1] = from[i] - FIRST + 1
      reply[#reply + 1] = raws[i]
      reply[#reply + 1] = unwanted[i] and 1 or 0
      reply[#reply + 1] = tried[i] and redis.call('HGET', histories, id) or ''
      reply[#reply + 1] = tried[i] and tonumber(string.match(tried[i], '^%d+/(%d+)')) or 0
    end
  end
  if #records > 0 then
    redis.call('HSET', claims, unpack(records))
    redis.call('ZADD', leases, unpack(terms))
    -- pcall: producers may write to this key too.
    if #ends > 0 then redis.pcall('ZADD', deadlines, unpack(ends)) end
    redis.call('SET', last_claim, number .. '|' .. cjson.encode(ids), 'PX', math.max(lease_ms, LAST_CLAIM_KEPT_MS))
  end
end
-- A value that is no number must not end the script: the counters are for information only.
if dropped > 0 and type(redis.pcall('HINCRBY', counters, 'duplicates_dropped', dropped)) ~= 'number' then
  redis.call('HSET', counters, 'duplicates_dropped', dropped)
end
return reply
