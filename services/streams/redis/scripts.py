"""The server-side scripts of the Redis Streams consumer. Each is atomic: the server runs nothing in between.

KEYS[1] is the submissions stream throughout; ARGV begins with the group and, where one acts, the consumer.
They use nothing newer than Redis 6.2, so they run on every Valkey.
"""

from typing import Final

SETTLE: Final = """
-- KEYS: stream, then the stream of each output.  ARGV: group, consumer, id, then for each output: n, n x field or value
-- 1: settled.  0: another consumer has the entry, nothing changed.  -1: nobody has it, nothing changed.
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1) == 0 then return -1 end
  return 0
end
local at = 4
for i = 2, #KEYS do
  local n = tonumber(ARGV[at])
  redis.call('XADD', KEYS[i], '*', unpack(ARGV, at + 1, at + n))
  at = at + n + 1
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 1
"""

RENEW: Final = """
-- ARGV: group, consumer, ids.  Returns the ids that this consumer does not have any more.
local lost = {}
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 0 then
    lost[#lost + 1] = ARGV[i]
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  end
end
return lost
"""

CLAIM: Final = """
-- ARGV: group, consumer, idle ms, cursor, count.  Returns the next cursor and {id, fields, deliveries} for each entry.
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local taken = {}
for _, entry in ipairs(reply[2]) do
  if entry and entry[2] then
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
    taken[#taken + 1] = {entry[1], entry[2], pending[1] and pending[1][4] or 1}
  end
end
return {reply[1], taken}
"""

LEAVE: Final = """
-- ARGV: group, consumer, idle ms.  Makes all entries of the consumer claimable at once. XGROUP DELCONSUMER would drop
-- them, so the consumer is deleted only when it has none; otherwise another member deletes it later.
local from = '-'
repeat
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], from, '+', 100, ARGV[2])
  for _, entry in ipairs(pending) do
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'IDLE', ARGV[3], 'JUSTID')
    from = '(' .. entry[1]
  end
until #pending == 0
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
return 0
"""

DELETE_IDLE_CONSUMERS: Final = """
-- ARGV: group, consumer, idle ms.  Deletes the other consumers that hold nothing and were silent for that long.
local deleted = 0
for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local of = {}
  for i = 1, #fields, 2 do of[fields[i]] = fields[i + 1] end
  if of.name ~= ARGV[2] and of.pending == 0 and of.idle > tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of.name)
    deleted = deleted + 1
  end
end
return deleted
"""

TRIM: Final = """
-- ARGV: retention ms.  Drops entries older than that, except entries that a group has not settled.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local function parse(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local now = redis.call('TIME')
local bound = string.format('%.0f-0', math.max(0, tonumber(now[1]) * 1000 - tonumber(ARGV[1])))
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local of = {}
  for i = 1, #fields, 2 do of[fields[i]] = fields[i + 1] end
  local oldest = of['last-delivered-id']
  if of.pending > 0 then oldest = redis.call('XPENDING', KEYS[1], of.name)[2] end
  local ms, seq = parse(oldest)
  local bound_ms, bound_seq = parse(bound)
  if ms < bound_ms or (ms == bound_ms and seq < bound_seq) then bound = oldest end
end
return redis.call('XTRIM', KEYS[1], 'MINID', '~', bound)
"""

LAG: Final = """
-- ARGV: group.  Returns the pending entries, the entries not delivered yet and the entries ever added. The second are
-- counted (up to 10000) if the server does not report them: after an entry was deleted, and before Redis 7. Before
-- Redis 7 the length of the stream is returned in place of the entries ever added.
local added = redis.call('XLEN', KEYS[1])
local stream = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #stream, 2 do
  if stream[i] == 'entries-added' then added = stream[i + 1] end
end
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local of = {}
  for i = 1, #fields, 2 do of[fields[i]] = fields[i + 1] end
  if of.name == ARGV[1] then
    if type(of.lag) == 'number' then return {of.pending, of.lag, added} end
    local waiting, from = 0, '(' .. of['last-delivered-id']
    while waiting < 10000 do
      local entries = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 100)
      if #entries == 0 then return {of.pending, waiting, added} end
      waiting = waiting + #entries
      from = '(' .. entries[#entries][1]
    end
    return {of.pending, math.max(waiting, redis.call('XLEN', KEYS[1]) - of.pending), added}
  end
end
return redis.error_reply('NOGROUP no such consumer group')
"""
