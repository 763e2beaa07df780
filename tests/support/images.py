"""Settings and checks for the tests of images."""

import asyncio

from services.core.settings import Settings
from services.images.memory_budget import ByteBudget


def make_settings(**overrides: object) -> Settings:
    """Settings of a deployment whose stream and Redis nobody reaches."""
    required = {
        "stream_url": "redis://127.0.0.1:1",
        "redis_url": "redis://127.0.0.1:1",
        "s3_buckets": "images",
        "policy_bucket": "policies",
        "model": "tiny",
    }
    return Settings.model_validate(required | overrides)


async def can_reserve(budget: ByteBudget, size: int) -> bool:
    """Whether `size` bytes are free, and nobody waits for bytes."""
    try:
        async with asyncio.timeout(0), budget.reserve(size):
            return True
    except TimeoutError:
        return False


async def wait_for_a_waiter(budget: ByteBudget) -> None:
    """Return when somebody waits for bytes: then even a single byte is not granted."""
    async with asyncio.timeout(30):
        while await can_reserve(budget, 1):  # noqa: ASYNC110 - a budget tells nobody who waits
            await asyncio.sleep(0.01)
