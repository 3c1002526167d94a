-- What the first format's workers run; not to be changed.
local function newest(key)
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  if last then return last[1] end
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for place = 1, #info, 2 do
      if info[place] == 'last-generated-id' then return info[place + 1] end
    end
  end
  return false
end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
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
-- publish
local key, topic, payload, nonce, capacity, age, ttl = KEYS[1], unpack(ARGV)
local prev = newest(key)
local id, ms = next_id(prev, nonce)
prev = prev or '0-' .. nonce
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
-- read
local key, after, limit, nonce, age, ttl = KEYS[1], unpack(ARGV)
local head = newest(key)
if not head then
  head = next_id(false, nonce)
  redis.call('XADD', key, head, 'p', '', 'd', '')
  redis.call('XDEL', key, head)
  redis.call('PEXPIRE', key, ttl)
end
if after == '' then return {head, 1} end
local oldest = 0
if age ~= '' then oldest = math.max(0, now() - age) end
local function read(start, prev)
  local found, size, left = {head, 0}, 0, tonumber(limit)
  while left > 0 and size < 4194304 do
    local piece = redis.call('XRANGE', key, start, '+', 'COUNT', math.min(left, 100))
    for place, entry in ipairs(piece) do
      local fields = entry[2]
      found[#found + 1] = entry[1]
      found[#found + 1] = fields[2]
      found[#found + 1] = fields[4]
      size = size + #fields[4]
    end
    left = left - #piece
    if #piece < 100 then break end
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
end
return read(from_oldest, false)
