local heads, ttl, marks = {}, tonumber(ARGV[1]), table.remove(KEYS)
for place, key in ipairs(KEYS) do
  local is_stream, head = pcall(newest, key)
  local found = is_stream and not head and mark(key, marks)
  heads[place] = is_stream and head or found and '0-' .. found or ''
  local left = redis.call('PTTL', key)
  if left >= 0 and left < ttl * 0.9 then redis.call('PEXPIRE', key, ttl) end
end
return heads
