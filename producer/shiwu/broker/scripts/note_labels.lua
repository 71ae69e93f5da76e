-- Stores label sets by digest. The number of sets that came with requests is limited; the oldest are removed.
-- KEYS  labels, digests of single requests' sets      ARGV  max number of these, then for each set: digest, JSON, '1' if of a request
local labels, order, max_sets = KEYS[1], KEYS[2], tonumber(ARGV[1])
redis.call('HLEN', labels)
redis.call('LLEN', order)
for i = 2, #ARGV, 3 do
  local digest, text, is_of_request = ARGV[i], ARGV[i + 1], ARGV[i + 2] == '1'
  if redis.call('HEXISTS', labels, digest) == 0 and is_of_request then redis.call('LPUSH', order, digest) end
  redis.call('HSET', labels, digest, text)
end
for _ = max_sets + 1, redis.call('LLEN', order) do redis.call('HDEL', labels, redis.call('RPOP', order)) end
