-- Takes expired messages out of a lane; the caller then answers them.
-- Each is recorded under a lease like a claim, because a message without a record would be lost if the caller crashed. Its
-- attempt 0 says that nothing was tried: maintenance returns it to its lane without counting an attempt or a worker death.
-- KEYS  claims, leases, attempts, a lane key
-- ARGV  token, lease in ms, the name of the lane key as records have it, then for each: id, raw message
-- Reply for each that was still in the lane and now belongs to the caller: its number, 1 for the first; generation. Of two
-- messages with one id the first is taken
local claims, leases, attempts, lane, token = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
local taken = {}
-- A key of a wrong type must stop the script before the first message is removed, because Redis does not undo a script.
redis.call('HLEN', claims)
redis.call('HLEN', attempts)
redis.call('ZCARD', leases)
for i = 4, #ARGV, 2 do
  local id, raw = ARGV[i], ARGV[i + 1]
  if redis.call('HEXISTS', claims, id) == 0 and redis.call('LREM', lane, -1, raw) == 1 then
    redis.call('HSET', claims, id, token .. '|0|' .. ARGV[3] .. '|' .. raw)
    redis.call('ZADD', leases, ends, id)
    taken[#taken + 1] = (i - 2) / 2
    taken[#taken + 1] = tonumber(string.match(redis.call('HGET', attempts, id) or '', '^%d+/(%d+)')) or 0
  end
end
return taken
