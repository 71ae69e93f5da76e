-- Returns what a watcher took and did not finish to the head of the list, if the watcher was not seen for long enough.
-- KEYS: events list, taken list, watchers. ARGV: watcher, seen at the latest in ms, messages at most.
-- Reply: how many messages were returned.
local seen = redis.call('ZSCORE', KEYS[3], ARGV[1])
if not seen or tonumber(seen) > tonumber(ARGV[2]) then
  return 0
end
local returned = 0
while returned < tonumber(ARGV[3]) and redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do
  returned = returned + 1
end
if redis.call('LLEN', KEYS[2]) == 0 then
  redis.call('ZREM', KEYS[3], ARGV[1])
end
return returned
