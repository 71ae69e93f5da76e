-- Announces the answers of copies that a claim holds because their ids were answered before, and ends these claims. An answer
-- that is no longer kept is replaced by `already_answered`, and the client gets that.
-- KEYS  claims, leases, then the result key of each id, which is also the channel on which it is announced
-- ARGV  token, how long a result is kept in s, result of a job whose id was answered before: Celery's JSON with a zero byte at
--       each position of the id, then the ids
local claims, leases, token, result_ttl, answered_before = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
local held = token .. '|0|'
local is_shard = string.find(claims, '^{[^}]*}:') ~= nil
-- A key of a wrong type must stop the script before its first write, because Redis does not undo a script.
redis.call('HLEN', claims)
redis.call('ZCARD', leases)
for i = 4, #ARGV do
  local id, key = ARGV[i], KEYS[i - 1]
  local record = redis.call('HGET', claims, id)
  if record and string.sub(record, 1, #held) == held then
    -- The first write frees memory: a full server refuses a script whose first write needs some.
    redis.call('HDEL', claims, id)
    redis.call('ZREM', leases, id)
    local result = redis.pcall('GET', key)
    if not result then
      result = string.gsub(answered_before, '%z', function() return cjson.encode(id) end)
      redis.call('SET', key, result, 'EX', result_ttl)
    end
    if type(result) == 'string' then
      if is_shard then redis.call('SPUBLISH', key, result) end
      -- In a cluster this is for Celery's clients.
      redis.call('PUBLISH', key, result)
    end
  end
end
