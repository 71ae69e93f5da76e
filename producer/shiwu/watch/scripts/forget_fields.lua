-- Deletes fields of a hash whose values are still those that were read.
-- KEYS: hash. ARGV: field, value, field, value, ... Reply: how many were deleted.
local deleted = 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    deleted = deleted + redis.call('HDEL', KEYS[1], ARGV[i])
  end
end
return deleted
