-- Trims the results stream. Entries that a consumer group has not acknowledged are dropped too, and reported.
-- KEYS  results stream, counters      ARGV  max length, max entries to drop in one call, bytes to free
-- Reply {entries dropped, then for each group that lost some: name, how many}
local results, counters = KEYS[1], KEYS[2]
local excess, most, to_free = redis.call('XLEN', results) - tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local PORTION, MOST_BYTES = 100, 64 * 1024 * 1024
if excess <= 0 and to_free <= 0 then return { 0 } end

-- The ids of the entries to drop, and the id of the first one that stays. The newest one always stays.
local oldest, freed, last_bytes, cut, from = {}, 0, 0, nil, '-'
while not cut do
  local portion = redis.call('XRANGE', results, from, '+', 'COUNT', PORTION)
  if #portion == 0 then break end
  for _, entry in ipairs(portion) do
    if #oldest >= most or freed >= MOST_BYTES or (#oldest >= excess and freed >= to_free) then
      cut = entry[1]
      break
    end
    last_bytes = 0
    for i = 2, #entry[2], 2 do last_bytes = last_bytes + #entry[2][i] end
    freed = freed + last_bytes
    oldest[#oldest + 1] = entry[1]
  end
  from = '(' .. portion[#portion][1]
end
if not cut then
  cut = table.remove(oldest)
  freed = freed - last_bytes
end
if #oldest == 0 then return { 0 } end

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
    for _, entry in ipairs(redis.call('XPENDING', results, group['name'], '-', '(' .. cut, #oldest)) do
      lost = lost + (before(entry[1], cut) and 1 or 0)
    end
  end
  -- ... and those that were never delivered.
  for i = #oldest, 1, -1 do
    if not before(group['last-delivered-id'], oldest[i]) then break end
    lost = lost + 1
  end
  if lost > 0 then
    reply[#reply + 1] = group['name']
    reply[#reply + 1] = lost
    lost_in_all = lost_in_all + lost
  end
end
reply[1] = redis.call('XTRIM', results, 'MINID', cut)
redis.pcall('HINCRBY', counters, 'results_bytes', -freed)
if lost_in_all > 0 and type(redis.pcall('HINCRBY', counters, 'results_dropped', lost_in_all)) ~= 'number' then
  redis.pcall('HSET', counters, 'results_dropped', lost_in_all)
end
return reply
