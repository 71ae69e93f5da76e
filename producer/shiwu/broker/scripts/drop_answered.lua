-- Removes messages from a lane whose jobs were answered while they waited there: cancelled, or out of time. Workers do this
-- when they claim; without a worker on the lane, the jobs would be worked on once their marks have expired. Callbacks of a
-- removed message are to be sent by any worker.
-- KEYS  a lane key, canvas, canvas due, counters, answers with pending callbacks, their expiry, the 4 hashes of marks
-- ARGV  the name of the lane key as records have it, then for each: id, raw message
-- Reply how many were removed
local lane, canvas, canvas_due, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local pending_answers, pending_expiry, lane_name = KEYS[5], KEYS[6], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- A key of a wrong type must stop the script before the first message is removed, because Redis does not undo a script.
redis.call('HLEN', canvas)
redis.call('ZCARD', canvas_due)
redis.call('HLEN', pending_answers)
redis.call('ZCARD', pending_expiry)
local MARKS, LAST_MARKS = 7, 10
for k = MARKS, LAST_MARKS do redis.call('HLEN', KEYS[k]) end
local dropped = 0
for i = 2, #ARGV, 2 do
  local id, raw = ARGV[i], ARGV[i + 1]
  local mark, answer = false, redis.call('HGET', pending_answers, id)
  for k = MARKS, LAST_MARKS do mark = mark or redis.call('HGET', KEYS[k], id) end
  if mark and answer and redis.pcall('LREM', lane, -1, raw) == 1 then
    local generation = string.match(mark, '#(%d+)$')
    local member = generation and id .. '\255' .. generation or id
    redis.call('HSET', canvas, member, #answer .. '|' .. answer .. lane_name .. '|' .. raw)
    redis.call('ZADD', canvas_due, now, member)
    redis.call('HDEL', pending_answers, id)
    redis.call('ZREM', pending_expiry, id)
    dropped = dropped + 1
  end
end
if dropped > 0 then redis.pcall('HINCRBY', counters, 'duplicates_dropped', dropped) end
return dropped
