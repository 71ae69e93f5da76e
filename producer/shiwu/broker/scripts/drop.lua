-- Deletes dead letters. Their answers stay under their keys.
-- KEYS  dead, dead answers, dead messages      ARGV  ids...      Reply how many were deleted
-- A key of a wrong type must stop the script before its first write, because Redis does not undo a script.
redis.call('HLEN', KEYS[2])
redis.call('HLEN', KEYS[3])
local dropped = redis.call('ZREM', KEYS[1], unpack(ARGV))
redis.call('HDEL', KEYS[2], unpack(ARGV))
redis.call('HDEL', KEYS[3], unpack(ARGV))
return dropped
