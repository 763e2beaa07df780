"""The tries of replayed submissions before they became dead letters, in Redis.

A producer can write every header of a submission. So the number of tries does not come from a header: the replay
records it before it publishes the submission, and Intake looks it up by the position of the dead letter and the value.
Header and value of a producer that match a recorded replay are that replay.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

from services.core.errors import RedisUnavailable
from services.core.messages import REPLAYED_FROM_HEADER
from services.core.redis import READ_FUNCTIONS, RedisClient
from services.streams.base import Message

_TTL_S: Final = 30 * 86_400
"""Streams keep a submission for less than this."""
_MAX_ATTEMPTS: Final = 999_999
_NUMBER_LIMIT_BYTES: Final = 19
_PAUSE_S: Final = 10.0
"""After a failed look-up. A producer that sets the header must not slow Intake down while Redis hangs."""

_FIND: Final = f"""{READ_FUNCTIONS}
local numbers = {{}}
for n, key in ipairs(KEYS) do numbers[n] = read(key, ARGV[1], false) end
return numbers
"""

log = logging.getLogger(__name__)


class ReplayedAttempts:
    """Writes and reads the numbers."""

    def __init__(self, redis: RedisClient, dead_letters_stream: str) -> None:
        self._redis = redis
        self._prefix = f"sluice:{dead_letters_stream}:replayed-attempts:"
        self._paused_until = 0.0

    async def record(self, attempts: Mapping[tuple[str, bytes], int]) -> None:
        """Record the tries of dead letters, by their position and value.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        pipeline = self._redis.client.pipeline(transaction=False)
        for (position, value), number in attempts.items():
            pipeline.set(self._key(position.encode(), value), max(0, number), ex=_TTL_S)
        await self._redis.call(pipeline.execute())

    async def find(self, messages: Sequence[Message]) -> list[int]:
        """The earlier tries of each message. They are 0 if it is no replay, or if Redis does not answer."""
        names = {}
        for number, message in enumerate(messages):
            position = message.header(REPLAYED_FROM_HEADER)
            if position is not None:
                names[number] = self._key(position, message.value)
        found = [0] * len(messages)
        if names and time.monotonic() >= self._paused_until:
            try:
                values = await self._redis.run(_FIND, list(names.values()), _NUMBER_LIMIT_BYTES)
            except RedisUnavailable as error:
                self._paused_until = time.monotonic() + _PAUSE_S
                log.debug("Redis is unavailable; earlier tries of replayed submissions are not counted: %s", error)
            else:
                for number, value in zip(names, values, strict=True):
                    found[number] = _parse(value)
        return found

    def _key(self, position: bytes, value: bytes) -> str:
        text = json.dumps(position.decode(errors="replace")).encode()
        return self._prefix + hashlib.blake2b(text + value, digest_size=16).hexdigest()


def _parse(value: bytes | None) -> int:
    return min(int(value), _MAX_ATTEMPTS) if value and value.isdigit() else 0
