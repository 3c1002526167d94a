"""The Lua scripts, and the event ids that they make."""

from __future__ import annotations

import hashlib
import re

__all__ = ["HEADS", "ID", "ID_BYTES", "NEWEST", "PUBLISH", "READ", "Script"]
# What Redis takes, with room to count on. Ids come from outside.
ID = re.compile(r"[0-9]{1,15}-[0-9]{1,16}")
ID_BYTES = re.compile(ID.pattern.encode())


class Script:
    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


_COMMON = """
local function newest(key)
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for place = 1, #info, 2 do
      if info[place] == 'last-generated-id' then return info[place + 1] end
    end
  end
  return false
end
local function field_of(key)
  return string.sub(redis.sha1hex(key), 1, 12)
end
local function mark(key, marks)
  local found = redis.call('HMGET', marks, field_of(key), 'epoch')
  return found[1] or found[2]
end
local function head_of(key, marks, nonce)
  local head = newest(key)
  if head then return head end
  local found = mark(key, marks)
  if not found then
    redis.pcall('HSET', marks, 'epoch', nonce)
    found = nonce
  end
  return '0-' .. found
end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function is_ours(id)
  local ms, number = string.match(id, '(%d+)-(%d+)')
  return #ms <= 15 and tonumber(number) < 4503599627370496  -- 2^52
end
local function next_id(last, nonce)
  local ms, number = now(), tonumber(nonce)
  if last then
    local last_ms, last_number = string.match(last, '(%d+)-(%d+)')
    if tonumber(last_ms) >= ms then
      ms = tonumber(last_ms)
      number = tonumber(last_number) + 1 + number % 1048576
    end
  end
  return string.format('%.0f-%.0f', ms, number), ms
end
"""

# What is refused, for want of memory, say, is refused at its first write; what fails
# after that, for want of rights, is stored.
PUBLISH = Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local topic, payload, nonce, capacity, age, ttl = unpack(ARGV)
local prev = newest(key)
-- After an id that is none of ours, and that has no room for another, it begins anew.
if prev and not is_ours(prev) then
  redis.call('UNLINK', key)
  prev = false
end
local id, ms = next_id(prev, nonce)
local found = redis.call('HMGET', marks, field_of(key), 'epoch')
-- A key that has no mark was made by an earlier version, or the marks were evicted:
-- what was the head before it must not be the head after it, either. Those have half
-- of the room: many channels that live have not all marks forgotten again and again.
if not prev or (not found[1] and redis.call('HLEN', marks) < 50000) then
  prev = prev or '0-' .. (found[1] or found[2] or nonce)
  local has_epoch = found[2]
  -- All is forgotten now and then: the empty channels' readers are reset.
  if redis.call('HLEN', marks) > 100000 then
    redis.call('UNLINK', marks)
    has_epoch = false
  end
  if not has_epoch then redis.call('HSET', marks, 'epoch', nonce) end
  local other = string.format('%.0f', tonumber(nonce) + 1)
  redis.call('HSET', marks, field_of(key), other)
end
redis.call('XADD', key, 'MAXLEN', capacity, id, 'p', prev, 'd', payload)
local is_told, problem = pcall(function()
  if age == '' then
    redis.call('PERSIST', key)
  else
    redis.call('XTRIM', key, 'MINID', '~', string.format('%.0f', ms - age))
    redis.call('PEXPIRE', key, ttl)
  end
  redis.call('PUBLISH', topic, id .. ' ' .. prev .. ' ' .. payload)
end)
if is_told then return id end
if type(problem) == 'table' then problem = problem.err end
return redis.error_reply('STORED, but: ' .. problem)
"""
)

# Returns the head, whether nothing is missing, then id, prev and payload of each. In
# pieces, because payloads may be large and nobody takes more than `log.JOIN` of them:
# hundreds of MiB would hold up the server for all.
READ = Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local after, limit, nonce, age = unpack(ARGV)
local head = head_of(key, marks, nonce)
if after == '' then return {head, 1} end
local oldest = 0
if age ~= '' then oldest = math.max(0, now() - age) end
local function read(start, prev)
  local found, size, left, step = {head, 0}, 0, tonumber(limit), 1
  while left > 0 and size < 131072 do
    step = math.min(2 * step, 16, left)
    local piece = redis.call('XRANGE', key, start, '+', 'COUNT', step)
    for place, entry in ipairs(piece) do
      local fields = entry[2]
      found[#found + 1] = entry[1]
      local payload = fields[4] or ''  -- there may be what is none of ours
      found[#found + 1] = fields[2]
      found[#found + 1] = payload
      size = size + #payload
    end
    left = left - #piece
    if #piece < step then break end
    start = '(' .. piece[#piece][1]
  end
  if (found[4] or head) == prev then found[2] = 1 end
  return found
end
local from_oldest = string.format('%.0f', oldest)
if after ~= '0' then
  local start = '(' .. after
  if tonumber(string.match(after, '%d+')) < oldest then start = from_oldest end
  local found = read(start, after)
  if found[2] == 1 then return found end
  -- What follows it is gone, it is not: the rest follows.
  if start ~= from_oldest and redis.call('XRANGE', key, after, after)[1] then
    return found
  end
end
return read(from_oldest, false)
"""
)

# Returns the id before the newest of a channel that are not too old, and its head.
NEWEST = Script(
    _COMMON
    + """
local key, marks = KEYS[1], KEYS[2]
local count, nonce, age = unpack(ARGV)
local head = head_of(key, marks, nonce)
local oldest, before, left, stop = '-', head, tonumber(count), '+'
if age ~= '' then oldest = string.format('%.0f', math.max(0, now() - age)) end
while left > 0 do
  local piece = redis.call('XREVRANGE', key, stop, oldest, 'COUNT', math.min(left, 100))
  if #piece == 0 then break end
  before = piece[#piece][2][2]
  stop = '(' .. piece[#piece][1]
  left = left - #piece
end
return {before, head}
"""
)

HEADS = Script(
    _COMMON
    + """
local heads, ttl, marks = {}, tonumber(ARGV[1]), table.remove(KEYS)
for place, key in ipairs(KEYS) do
  local is_stream, head = pcall(newest, key)
  local found = is_stream and not head and mark(key, marks)
  heads[place] = is_stream and head or found and '0-' .. found or ''
  local left = redis.call('PTTL', key)
  if left >= 0 and left < ttl * 0.9 then redis.call('PEXPIRE', key, ttl) end
end
return heads
"""
)
