"""A sample of the recent submissions of each policy, to test other versions. It has references, not images."""

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from contextlib import suppress
from typing import Final, Self

from pydantic import ValidationError

from services.core.errors import RedisUnavailable
from services.core.messages import Submission, UtcDatetime, Verdict
from services.core.redis import READ_FUNCTIONS, RedisClient
from services.core.tasks import cancel_and_wait
from services.core.values import WireModel

_FLUSH_INTERVAL_S: Final = 1.0
_DECAY_S: Final = 86_400.0
"""Time constant of the decay: a submission is e times as likely to be sampled as one that is this much older."""
_HOURS_PER_DAY: Final = 24
_ENTRY_LIMIT_BYTES: Final = 64 << 10
"""The fields of a submission have limits that sum up to less, even if JSON escapes each character."""
_SAMPLE_LIMIT_BYTES: Final = 64 << 20
_COUNT_LIMIT_BYTES: Final = 19

# Keeps the entries with the highest keys; see _make_sort_key. Also counts the submissions of each hour.
_ADD: Final = """
for i = 3, #ARGV, 2 do redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - ARGV[1])
local hour = math.floor(redis.call('TIME')[1] / 3600)
redis.call('HINCRBY', KEYS[2], hour, ARGV[2])
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
    if (tonumber(field) or 0) < hour - 24 then redis.call('HDEL', KEYS[2], field) end
end
local lowest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) and lowest[2] or ''
"""
# Others may have written huge entries, or any number of hours; it returns none of these.
_DRAW: Final = f"""{READ_FUNCTIONS}
local members, hours, now = {{}}, {{}}, redis.call('TIME')
local left = tonumber(ARGV[4])
for _, member in ipairs(redis.call('ZRANDMEMBER', KEYS[1], ARGV[1])) do
    if #member <= tonumber(ARGV[2]) and #member <= left then
        members[#members + 1] = member
        left = left - #member
    end
end
local last = math.floor(now[1] / 3600)
for hour = last - 24, last do
    local count = read_field(KEYS[2], hour, ARGV[3], false)
    if count then
        hours[#hours + 1] = hour
        hours[#hours + 1] = count
    end
end
return {{members, hours, now}}
"""

log = logging.getLogger(__name__)


class SampledSubmission(WireModel):
    """A submission in the sample, with the fields to fetch the same object again."""

    id: str
    uri: str
    version_id: str | None
    etag: str | None
    tenant: str
    at: UtcDatetime

    def to_submission(self) -> Submission:
        """The submission to judge again, with backfill priority."""
        return Submission(
            id=self.id,
            uri=self.uri,
            version_id=self.version_id,
            etag=self.etag,
            tenant=self.tenant,
            priority="backfill",
        )


class TrafficSample:
    """Adds submissions to the sample. Use it as an async context manager. While Redis is down they are dropped."""

    def __init__(self, redis: RedisClient, *, size: int) -> None:
        """`size`: entries kept for each policy name."""
        self._redis = redis
        self._size = size
        self._new: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._min_sort_keys: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._flush_periodically())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    def add(self, verdict: Verdict) -> None:
        """Add the submission of a verdict, or skip it. Needs no network."""
        if verdict.policy is None:
            return
        name = verdict.policy.name
        self._counts[name] += 1
        sort_key = _make_sort_key(time.time())
        if len(self._new[name]) < self._size and sort_key > self._min_sort_keys.get(name, -math.inf):
            sampled = SampledSubmission(
                id=verdict.submission_id,
                uri=verdict.uri,
                version_id=verdict.version_id,
                etag=verdict.etag,
                tenant=verdict.tenant,
                at=verdict.submitted_at,
            )
            self._new[name].append((sort_key, sampled.model_dump_json()))

    async def flush(self) -> None:
        """Write the new submissions to Redis."""
        counts, self._counts = self._counts, defaultdict(int)
        new, self._new = self._new, defaultdict(list)
        for name, count in counts.items():
            entries = [part for entry in new[name] for part in entry]
            try:
                lowest = await self._redis.run(_ADD, _redis_keys(self._redis, name), self._size, count, *entries)
            except RedisUnavailable as error:
                log.debug("writing the traffic sample of %s failed; its new submissions are dropped: %s", name, error)
            else:
                self._min_sort_keys[name] = float(lowest) if lowest else -math.inf

    async def _flush_periodically(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL_S)
            try:
                await self.flush()
            except Exception:
                log.exception("writing the traffic sample failed; new submissions are left out of backtests")


async def draw_sample(redis: RedisClient, name: str, count: int) -> tuple[list[SampledSubmission], float | None]:
    """Up to `count` sampled submissions of a policy name, and its submissions per day (None: not known yet).

    Raises:
        RedisUnavailable: Redis does not answer.
    """
    limits = (_ENTRY_LIMIT_BYTES, _COUNT_LIMIT_BYTES, _SAMPLE_LIMIT_BYTES)
    members, hours, now = await redis.run(_DRAW, _redis_keys(redis, name), count, *limits)
    found = []
    for member in members:
        with suppress(ValidationError):
            found.append(SampledSubmission.model_validate_json(member))
    counted = {hour: int(number) for hour, number in zip(hours[::2], hours[1::2], strict=True) if number.isdigit()}
    elapsed_hours = int(now[0]) / 3600 - min(counted, default=0)
    return found, sum(counted.values()) / elapsed_hours * _HOURS_PER_DAY if counted and elapsed_hours >= 1 else None


def _make_sort_key(at: float) -> float:
    """A random key. The entries with the highest keys are a sample weighted by exp(-age), in any order of arrival.

    Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006), in logarithms, with forward decay
    (Cormode et al., 2009).
    """
    return at / _DECAY_S - math.log(random.expovariate(1.0) or 1e-300)


def _redis_keys(redis: RedisClient, name: str) -> list[str]:
    return [redis.key("sample", name), redis.key("seen", name)]
