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
      local payload = fields[4] or ''  -- a foreign entry may have no payload
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
  -- The id is kept but its next entry was removed: return the later entries.
  if start ~= from_oldest and redis.call('XRANGE', key, after, after)[1] then
    return found
  end
end
return read(from_oldest, false)
