local now = math.floor(redis.call('TIME')[1] / ARGV[1])
redis.call('HINCRBY', KEYS[1], now .. ':judged', ARGV[3])
redis.call('HINCRBY', KEYS[1], now .. ':blocked', ARGV[4])
redis.call('EXPIRE', KEYS[1], math.ceil(2 * ARGV[1] * ARGV[2]))
local sums = {judged = 0, blocked = 0}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
    local slice, name = string.match(entries[i], '(%d+):(%a+)')
    if tonumber(slice) > now - ARGV[2] then
        sums[name] = sums[name] + entries[i + 1]
    else
        redis.call('HDEL', KEYS[1], entries[i])
    end
end
return {sums.judged, sums.blocked}
