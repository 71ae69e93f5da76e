-- Trims the results stream. Entries that a consumer group has not acknowledged are dropped too, and reported.
-- KEYS  results stream, counters      ARGV  max length, max entries to drop in one call
-- Reply {entries dropped, then for each group that lost some: name, how many}
local results, counters = KEYS[1], KEYS[2]
local excess = math.min(redis.call('XLEN', results) - tonumber(ARGV[1]), tonumber(ARGV[2]))
if excess <= 0 then return { 0 } end
local oldest = redis.call('XRANGE', results, '-', '+', 'COUNT', excess + 1)
local cut = oldest[#oldest][1]

local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local function before(a, b)
  local a_ms, a_seq = parts(a)
  local b_ms, b_seq = parts(b)
  return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end

local reply, lost_in_all = { 0 }, 0
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', results)) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  local lost = 0
  -- Entries that were delivered and not acknowledged ...
  if group['pending'] > 0 then
    for _, entry in ipairs(redis.call('XPENDING', results, group['name'], '-', '(' .. cut, excess)) do
      lost = lost + (before(entry[1], cut) and 1 or 0)
    end
  end
  -- ... and those that were never delivered.
  for i = #oldest - 1, 1, -1 do
    if not before(group['last-delivered-id'], oldest[i][1]) then break end
    lost = lost + 1
  end
  if lost > 0 then
    reply[#reply + 1] = group['name']
    reply[#reply + 1] = lost
    lost_in_all = lost_in_all + lost
  end
end
reply[1] = redis.call('XTRIM', results, 'MINID', cut)
if lost_in_all > 0 and type(redis.pcall('HINCRBY', counters, 'results_dropped', lost_in_all)) ~= 'number' then
  redis.pcall('HSET', counters, 'results_dropped', lost_in_all)
end
return reply
