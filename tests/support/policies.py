"""Registries and waits for the tests of policies."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import boto3
from botocore.config import Config
from pydantic import SecretStr

from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import RolloutChange

SIGNING_KEY = SecretStr("the key of the tests, unknown to Redis")


class CountingRegistry(PolicyRegistry):
    """Counts the reads of the bucket."""

    def __init__(self, registry: PolicyRegistry, pause_s: float = 0.0) -> None:
        """`pause_s`: the time that each read of a version takes longer."""
        super().__init__(registry.objects.client, registry.bucket)
        self.reads = Counter[str]()
        self._pause_s = pause_s

    def get(self, name: str, version: int) -> StoredVersion:
        self.reads[f"{name}@{version}"] += 1
        time.sleep(self._pause_s)
        return super().get(name, version)

    def find_newest_change(self, name: str) -> RolloutChange | None:
        self.reads[name] += 1
        return super().find_newest_change(name)


def unreachable() -> PolicyRegistry:
    """A registry whose S3 server does not exist."""
    config = Config(connect_timeout=0.2, retries={"max_attempts": 0})
    return PolicyRegistry(boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=config), "policies")


async def becomes(expected: Any, look: Callable[[], Awaitable[Any]], within_s: float = 30.0) -> None:
    """Wait until `look` returns `expected`."""
    deadline = time.monotonic() + within_s
    while (found := await look()) != expected:
        assert time.monotonic() < deadline, f"{found} instead of {expected}"
        await asyncio.sleep(0.01)


async def wait_for_listeners(redis_cache: PolicyRedisCache, count: int) -> None:
    """Wait until `count` policy caches have subscribed to the changes."""

    async def listeners() -> int:
        ((_, number),) = await redis_cache.client.pubsub_numsub(redis_cache.key("changes"))
        return int(number)

    await becomes(count, listeners)
