-- Sets the health of an endpoint to what another shard knows of it.
-- KEYS  those of records.lua, pending set of the endpoint
-- ARGV  endpoint, its health as the other shard holds it
-- Reply 1
local pending, endpoint = KEYS[6], ARGV[1]
redis.call('ZCARD', pending)
redis.call('HSET', health, endpoint, ARGV[2])
note_due(pending, endpoint, read_health(endpoint).not_before)
return 1
