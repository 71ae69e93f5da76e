-- Sets the idle time of stream entries that a consumer still holds: 0 before it works on them, or a long time when it gives
-- them up, so that the next consumer takes them over immediately.
-- KEYS  results stream      ARGV  group, consumer, idle time in ms, ids...      Reply the ids that it still holds
local stream, group, consumer, idle_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local held = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if #redis.call('XPENDING', stream, group, id, id, 1, consumer) > 0 then
    redis.call('XCLAIM', stream, group, consumer, 0, id, 'IDLE', idle_ms, 'JUSTID')
    held[#held + 1] = id
  end
end
return held
