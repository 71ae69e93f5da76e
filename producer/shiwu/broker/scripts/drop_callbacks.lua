-- Removes callbacks that were sent, unless the member has another record by now: that of a new message with the same id.
-- KEYS  canvas, canvas due      ARGV  member, SHA-1 of the record in hex      Reply 1 if it was removed
redis.call('ZCARD', KEYS[2])
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or redis.sha1hex(record) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
