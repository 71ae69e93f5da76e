-- Removes consumers of a group that hold no entries: one by its name, or all that have been idle long enough.
-- A consumer that holds entries is never removed, because its entries would be lost to the group.
-- KEYS  results stream      ARGV  group, name or '', min idle time in ms      Reply how many were removed
local stream, group, name, idle_ms = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local dropped = 0
for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local consumer = {}
  for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
  if consumer['pending'] == 0 and consumer['idle'] >= idle_ms and (name == '' or consumer['name'] == name) then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer['name'])
    dropped = dropped + 1
  end
end
return dropped
