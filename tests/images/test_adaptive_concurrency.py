"""Fewer requests when the store asks for fewer, and more again when it does not."""

import asyncio

import pytest

from services.core.errors import StoreUnavailable, Throttled
from services.images.adaptive_concurrency import AdaptiveConcurrency


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def refuse(limit: AdaptiveConcurrency, error: Exception) -> None:
    with pytest.raises(type(error)):
        async with limit.request():
            raise error


async def succeed(limit: AdaptiveConcurrency) -> None:
    async with limit.request():
        await asyncio.sleep(0)


async def test_burst_of_throttling_halves_the_limit_once() -> None:
    clock = Clock()
    limit = AdaptiveConcurrency(16, clock)
    await asyncio.gather(*(refuse(limit, Throttled("slow down")) for _ in range(16)))
    assert limit.limit == 8
    clock.now = 2
    await refuse(limit, Throttled("slow down"))
    assert limit.limit == 4


async def test_limit_stays_above_zero_and_recovers() -> None:
    clock = Clock()
    limit = AdaptiveConcurrency(8, clock)
    for _ in range(20):
        clock.now += 2
        await refuse(limit, Throttled("slow down"))
    assert limit.limit == 1
    for _ in range(200):
        await succeed(limit)
    assert limit.limit == 8


async def test_other_failures_do_not_change_the_limit() -> None:
    limit = AdaptiveConcurrency(8)
    await refuse(limit, StoreUnavailable("gone"))
    assert limit.limit == 8


async def test_concurrent_requests_stay_within_the_limit() -> None:
    clock = Clock()
    limit = AdaptiveConcurrency(8, clock)
    await refuse(limit, Throttled("slow down"))
    inside = most = 0

    async def request() -> None:
        nonlocal inside, most
        async with limit.request():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(request() for _ in range(6)))
    assert most <= 4
