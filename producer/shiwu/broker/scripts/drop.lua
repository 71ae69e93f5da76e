-- Deletes dead letters. Their answers stay under their keys.
-- KEYS  dead, dead answers, dead messages      ARGV  ids...      Reply how many were deleted
local dropped = redis.call('ZREM', KEYS[1], unpack(ARGV))
redis.call('HDEL', KEYS[2], unpack(ARGV))
redis.call('HDEL', KEYS[3], unpack(ARGV))
return dropped
