-- Adds a counter to the one that has its name now, and removes it. A value that is no number is dropped.
-- KEYS  counters      ARGV  old field, new field      Reply what was added, or an empty text where there is no such counter
local value = redis.call('HGET', KEYS[1], ARGV[1])
if not value then return '' end
redis.call('HDEL', KEYS[1], ARGV[1])
if type(redis.pcall('HINCRBY', KEYS[1], ARGV[2], value)) ~= 'number' then return '0' end
return value
