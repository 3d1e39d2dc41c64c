-- Checks the limits of one key and takes its share, in one step for all replicas. The clock is the store's.
-- KEYS: levels of the key's buckets (hash), leases of its requests in flight (sorted set by expiry)
-- ARGV: "enter", "charge" or "ask", requests per minute, seconds of audio per day, requests in flight,
--       lease (enter), seconds of audio (charge) or number of further questions (ask), seconds of a lease. An empty limit means none.
-- Returns: code of the refusal or "", seconds until a retry, requests in flight, levels of the two buckets.
local clock = redis.call("TIME")
local now = clock[1] + clock[2] / 1000000
local per_minute, audio_per_day, concurrent = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local num_in_flight = 0

local function level_of(bucket, capacity, refill_s)
  local stored = redis.call("HMGET", KEYS[1], bucket, bucket .. "_at")
  if not (stored[1] and stored[2]) then
    return capacity
  end
  -- A clock set back gives no refill, and its new time counts from then on.
  local elapsed = math.max(0, now - tonumber(stored[2]))
  return math.min(capacity, tonumber(stored[1]) + elapsed * capacity / refill_s)
end

local requests = per_minute and level_of("requests", per_minute, 60) or 0
local audio = audio_per_day and level_of("audio", audio_per_day, 86400) or 0

local function store(bucket, level, refill_s)
  redis.call("HSET", KEYS[1], bucket, string.format("%.9f", level), bucket .. "_at", string.format("%.6f", now))
  -- A full bucket needs no entry.
  if redis.call("TTL", KEYS[1]) < refill_s then
    redis.call("EXPIRE", KEYS[1], refill_s + 60)
  end
end

local function reply(code, wait_s)
  return { code, string.format("%.6f", wait_s), num_in_flight, string.format("%.9f", requests), string.format("%.9f", audio) }
end

if ARGV[1] == "charge" then
  local amount = tonumber(ARGV[5])
  if audio_per_day and amount > audio then
    -- A clip longer than the bucket never fits.
    return reply("audio_quota_exceeded", amount > audio_per_day and 86400 or (amount - audio) * 86400 / audio_per_day)
  end
  if audio_per_day then
    audio = audio - amount
    store("audio", audio, 86400)
  end
  return reply("", 0)
end

if ARGV[1] == "ask" then
  local amount = tonumber(ARGV[5])
  if per_minute and amount > requests then
    return reply("rate_limit_exceeded", math.min(60, (amount - requests) * 60 / per_minute))
  end
  if per_minute then
    requests = requests - amount
    store("requests", requests, 60)
  end
  return reply("", 0)
end

if concurrent then
  redis.call("ZREMRANGEBYSCORE", KEYS[2], "-inf", now)
  num_in_flight = redis.call("ZCARD", KEYS[2])
  if num_in_flight >= concurrent then
    return reply("too_many_in_flight", 1)
  end
end
if audio_per_day and audio < math.min(1, audio_per_day) then
  return reply("audio_quota_exceeded", (math.min(1, audio_per_day) - audio) * 86400 / audio_per_day)
end
if per_minute then
  if requests < 1 then
    return reply("rate_limit_exceeded", (1 - requests) * 60 / per_minute)
  end
  requests = requests - 1
  store("requests", requests, 60)
end
if concurrent then
  redis.call("ZADD", KEYS[2], now + ARGV[6], ARGV[5])
  redis.call("EXPIRE", KEYS[2], 2 * ARGV[6])
  num_in_flight = num_in_flight + 1
end
return reply("", 0)
