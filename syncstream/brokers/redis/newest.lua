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
