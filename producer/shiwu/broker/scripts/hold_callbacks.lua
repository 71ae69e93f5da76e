-- Renews the reservation of callbacks that this sender still has to send.
-- KEYS  canvas due      ARGV  the reservation, how long to reserve in ms, members...
-- Reply the new reservation, then the members that no other sender has taken
local due, reservation = KEYS[1], tonumber(ARGV[1])
local time = redis.call('TIME')
local renewed = string.format('%.1f', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2]) + 0.5)
local reply = { renewed }
-- First comes a write that needs no memory: a full server refuses a script whose first write needs memory.
redis.call('ZREM', due, '')
for i = 3, #ARGV do
  if tonumber(redis.call('ZSCORE', due, ARGV[i]) or 0) == reservation then
    redis.call('ZADD', due, renewed, ARGV[i])
    reply[#reply + 1] = ARGV[i]
  end
end
return reply
