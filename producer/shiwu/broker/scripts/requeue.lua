-- Puts dead letters at the back of their lane, with the same id, a new attempt count and no answer. Each requeue starts a
-- generation of the id: one more than the mark of its answer names. The attempts hold its number until it is answered, so
-- that a late answer of an earlier generation is discarded. A dead letter whose id is claimed or delayed stays: the id was sent
-- again after its mark had expired, and the answer to that message replaces the dead letter.
-- A dead letter whose record names another lane goes to bulk.
-- KEYS  dead, dead answers, dead messages, attempts, counters, claims, delayed messages, the 4 hashes of marks, then 4 keys of
--       each lane, interactive first, then the result key of each id, then the key of its mark as earlier versions know it
-- ARGV  the names of the lane keys as records have them, ids...
-- Reply the ids that were requeued
local dead, answers, messages, attempts, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local claims, delayed_messages = KEYS[6], KEYS[7]
local MARKS, LAST_MARKS, BULK, LANES = 8, 11, 16, 8
local RESULTS, IDS = LAST_MARKS + LANES, LANES -- before the first result key, and before the first id
local OLD_MARKS = RESULTS + #ARGV - IDS
local lane_keys, requeued = {}, {}
for n = 1, LANES do lane_keys[ARGV[n]] = KEYS[LAST_MARKS + n] end
for k = MARKS, LAST_MARKS do redis.call('HLEN', KEYS[k]) end
-- A key of a wrong type must stop the script before the first message is written, because Redis does not undo a script.
for _, hash in ipairs({ answers, messages, attempts, claims, delayed_messages }) do redis.call('HLEN', hash) end
redis.call('ZCARD', dead)
-- A full server refuses a script whose first write needs memory: this write needs none.
redis.call('HDEL', attempts, '')

local function generation_of(id, old_mark)
  local mark = redis.pcall('GET', old_mark)
  local generation = tonumber(string.match(redis.call('HGET', attempts, id) or '', '^%d+/(%d+)')) or 0
  for k = MARKS, LAST_MARKS do mark = redis.call('HGET', KEYS[k], id) or mark end
  if type(mark) ~= 'string' then return generation end
  return math.max(generation, tonumber(string.match(mark, '#(%d+)$')) or 0)
end

for i = IDS + 1, #ARGV do
  local id = ARGV[i]
  local record = redis.call('HGET', messages, id)
  local is_live = redis.call('HEXISTS', claims, id) == 1 or redis.call('HEXISTS', delayed_messages, id) == 1
  local lane, raw
  if record and not is_live then lane, raw = string.match(record, '^([^|]*)|(.*)$') end
  if raw and type(redis.pcall('LPUSH', lane_keys[lane] or KEYS[BULK], raw)) == 'number' then
    local old_mark = KEYS[OLD_MARKS + i - IDS]
    local generation = generation_of(id, old_mark) + 1
    for k = MARKS, LAST_MARKS do redis.call('HDEL', KEYS[k], id) end
    redis.call('DEL', old_mark, KEYS[RESULTS + i - IDS])
    redis.call('HSET', attempts, id, '0/' .. generation .. ':0')
    redis.call('ZREM', dead, id)
    redis.call('HDEL', answers, id)
    redis.call('HDEL', messages, id)
    requeued[#requeued + 1] = id
  end
end
if #requeued > 0 and type(redis.pcall('HINCRBY', counters, 'requeued', #requeued)) ~= 'number' then
  redis.pcall('HSET', counters, 'requeued', #requeued)
end
return requeued
