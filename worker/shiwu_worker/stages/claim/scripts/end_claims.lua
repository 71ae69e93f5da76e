-- Gives up the claims of a worker up to this number: one that the server has not run yet will claim nothing. Running it again
-- changes nothing.
-- KEYS  leases, this worker's last claim      ARGV  number of the claim, how long to remember it in ms
-- Reply the ids of the last claim that the server has run, as JSON, or '[]'
local number, ids = string.match(redis.call('GET', KEYS[2]) or '', '^(%d+)|(.*)$')
-- A server without free memory denies a script whose first write needs memory; this one needs none.
redis.call('ZREM', KEYS[1], '')
redis.call('SET', KEYS[2], math.max(tonumber(number or 0), tonumber(ARGV[1])) .. '|' .. (ids or '[]'), 'PX', ARGV[2])
return ids or '[]'
