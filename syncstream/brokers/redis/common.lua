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
