-- Answers jobs, each once: stores the answer, announces it, appends it to the stream, and drops claim, lease and attempts.
-- KEYS  claims, leases, attempts, results stream, dead letters, counters
-- ARGV  result ttl in s, mark ttl in s, longest stream, most dead letters, date, prefix of marks, prefix of results,
--       then for each job: id, kind, answer, start of Celery's result for a failure, raw message of a dead letter, mark
-- kind  S success, F failure, R revoked, followed by I when no result is wanted
-- Reply the ids that had been answered before, but not by an earlier try of this commit
local claims, leases, attempts, results, dead, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local result_ttl, done_ttl, longest, most_dead, date = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local done_prefix, result_prefix = ARGV[6], ARGV[7]
local STATES = { S = 'SUCCESS', F = 'FAILURE', R = 'REVOKED' }

-- A wrong type must stop the script before the first answer is marked.
redis.call('HLEN', claims)
redis.call('ZCARD', leases)
redis.call('HLEN', attempts)
redis.call('XLEN', results)
redis.call('XLEN', dead)

local ids, again = {}, {}
for i = 8, #ARGV, 6 do
  local id, kind, answer, head, raw = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local mark = ARGV[i + 5]
  ids[#ids + 1] = id
  if redis.call('SET', done_prefix .. id, mark, 'NX', 'EX', done_ttl) then
    if raw ~= '' then
      redis.call('XADD', dead, 'MAXLEN', '~', most_dead, '*', 'id', id, 'answer', answer, 'raw', raw)
    end
    if string.sub(id, 1, 1) ~= '~' then
      if string.sub(kind, 2, 2) ~= 'I' then
        local result = head == '' and answer or head .. ',"answer":' .. answer .. '}'
        local meta = '{"status":"' .. STATES[string.sub(kind, 1, 1)] .. '","result":' .. result
          .. ',"traceback":null,"children":[],"date_done":"' .. date .. '","task_id":"' .. id .. '"}'
        redis.call('SET', result_prefix .. id, meta, 'EX', result_ttl)
        redis.call('PUBLISH', result_prefix .. id, meta)
      end
      redis.call('XADD', results, 'MAXLEN', '~', longest, '*', 'id', id, 'answer', answer)
    end
  elseif redis.call('GET', done_prefix .. id) ~= mark then
    -- Our own mark means that an earlier try of this very commit had arrived and only its reply was lost.
    again[#again + 1] = id
  end
end
redis.call('HDEL', claims, unpack(ids))
redis.call('ZREM', leases, unpack(ids))
redis.call('HDEL', attempts, unpack(ids))
redis.call('HINCRBY', counters, 'answered', #ids - #again)
if #again > 0 then redis.call('HINCRBY', counters, 'answers_discarded', #again) end
return again
