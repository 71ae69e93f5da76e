-- Adds deliveries, and acknowledges the entries of the results stream that they come from, in one step.
-- KEYS  those of records.lua, results stream, then the pending set of each endpoint
-- ARGV  group, max dead deliveries, number of entries, the ids of the entries,
--       then for each delivery: number of its pending set, endpoint, webhook id, reason to give it up at once or '', payload
-- Reply how many deliveries were added. None where no entry was pending: an earlier run of this call added them.
local results, group, max_dead, count = KEYS[6], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 7, #KEYS do redis.call('ZCARD', KEYS[i]) end
local entries = {}
for i = 4, 3 + count do entries[#entries + 1] = ARGV[i] end
if redis.call('XACK', results, group, unpack(entries)) == 0 then return 0 end
local added = 0
for i = 4 + count, #ARGV, 5 do
  local pending, endpoint, id, reason = KEYS[6 + tonumber(ARGV[i])], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local record = join(now, 0, 0, ARGV[i + 4])
  if reason ~= '' then
    give_up(pending, endpoint, id, record, reason, max_dead)
    added = added + 1
  elseif redis.call('HSETNX', deliveries, endpoint .. '|' .. id, record) == 1 then
    redis.call('ZADD', pending, now, id)
    redis.call('ZADD', due, 'LT', now, endpoint)
    added = added + 1
  end
end
return added
