-- Changes the state of a backfill in one step, once only, and only for the process that runs it.
-- KEYS  state hash, hash of open jobs
-- ARGV  owner, number of its take, number of this write, changes as JSON {set: {field: text}, incr: {field: number}},
--       count of records, (id, record)..., ids of jobs that are closed...
-- Reply {'ok' | 'taken' | 'lost', what an operator wants: 'pause', 'cancel' or ''}
local state, open = KEYS[1], KEYS[2]
local held = redis.call('HMGET', state, 'owner', 'seq', 'wanted', 'takes')
if held[1] ~= ARGV[1] then
  -- Each take has a higher number, so a lower one is older than this owner's: a failover has lost its take.
  return {tonumber(held[4] or 0) >= tonumber(ARGV[2]) and 'taken' or 'lost', ''}
end
-- A caller that lost the reply repeats its write.
if held[2] == ARGV[3] then return {'ok', held[3] or ''} end
-- The write before this one was acknowledged, and is gone.
if tonumber(held[2]) ~= tonumber(ARGV[3]) - 1 then return {'lost', ''} end
local changes = cjson.decode(ARGV[4])
local last_record = 5 + 2 * tonumber(ARGV[5])
for i = 6, last_record, 1000 do
  redis.call('HSET', open, unpack(ARGV, i, math.min(i + 999, last_record)))
end
for i = last_record + 1, #ARGV, 1000 do
  redis.call('HDEL', open, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('HSET', state, 'seq', ARGV[3])
for field, text in pairs(changes.set) do redis.call('HSET', state, field, text) end
for field, number in pairs(changes.incr) do redis.call('HINCRBY', state, field, number) end
return {'ok', held[3] or ''}
