local key, marks = KEYS[1], KEYS[2]
local topic, payload, nonce, capacity, age, ttl = unpack(ARGV)
local prev = newest(key)
-- A foreign id may leave no room for a larger one: begin the stream anew.
if prev and not is_ours(prev) then
  redis.call('UNLINK', key)
  prev = false
end
local id, ms = next_id(prev, nonce)
local found = redis.call('HMGET', marks, field_of(key), 'epoch')
-- A key without a mark was made by an earlier version, or the marks were evicted: the
-- head from before the key must not be the head after it, too. Such keys get marks only
-- up to half of the maximum: otherwise many live channels would have all marks forgotten
-- again and again.
if not prev or (not found[1] and redis.call('HLEN', marks) < 50000) then
  prev = prev or '0-' .. (found[1] or found[2] or nonce)
  local has_epoch = found[2]
  -- Above the maximum forget all marks: readers of empty channels get a reset.
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
