-- Changes the state of a backfill in one step, once only, and only for the process that runs it.
-- KEYS  state hash, hash of open jobs
-- ARGV  owner, number of this write, changes as JSON {set: {field: text}, incr: {field: number}},
--       count of records, (id, record)..., ids of jobs that are closed...
-- Reply {'ok' | 'taken', what an operator wants: 'pause', 'cancel' or ''}
local state, open = KEYS[1], KEYS[2]
local held = redis.call('HMGET', state, 'owner', 'seq', 'wanted')
if held[1] ~= ARGV[1] then return {'taken', ''} end
-- A caller that lost the reply repeats its write.
if held[2] == ARGV[2] then return {'ok', held[3] or ''} end
local changes = cjson.decode(ARGV[3])
local last_record = 4 + 2 * tonumber(ARGV[4])
for i = 5, last_record, 1000 do
  redis.call('HSET', open, unpack(ARGV, i, math.min(i + 999, last_record)))
end
for i = last_record + 1, #ARGV, 1000 do
  redis.call('HDEL', open, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('HSET', state, 'seq', ARGV[2])
for field, text in pairs(changes.set) do redis.call('HSET', state, field, text) end
for field, number in pairs(changes.incr) do redis.call('HINCRBY', state, field, number) end
return {'ok', held[3] or ''}
