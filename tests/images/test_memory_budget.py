"""The byte budget: never exceeded, fair, and whole again after every cancellation."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.images.memory_budget import ByteBudget
from tests.support.images import can_reserve


async def test_reservations_are_granted_in_order() -> None:
    budget = ByteBudget(100)
    order: list[str] = []

    async def use(name: str, size: int) -> None:
        async with budget.reserve(size):
            order.append(name)
            await asyncio.sleep(0)

    async with budget.reserve(60):
        tasks = [asyncio.create_task(use(name, size)) for name, size in (("large", 90), ("small", 10), ("tiny", 1))]
        await asyncio.sleep(0)
        assert order == []  # the small ones would fit, but do not overtake
    await asyncio.gather(*tasks)
    assert order == ["large", "small", "tiny"]
    assert await can_reserve(budget, budget.limit_bytes)


async def test_reservation_over_the_limit_gets_the_whole_limit() -> None:
    budget = ByteBudget(100)
    async with budget.reserve(10**12):
        assert not await can_reserve(budget, 1)
    assert await can_reserve(budget, budget.limit_bytes)


async def test_cancelled_wait_lets_later_ones_pass() -> None:
    budget = ByteBudget(100)
    async with budget.reserve(50):
        first, second = budget.reserve(100), budget.reserve(50)
        large = asyncio.create_task(first.__aenter__())
        await asyncio.sleep(0)
        small = asyncio.create_task(second.__aenter__())
        await asyncio.sleep(0)
        assert not small.done()
        large.cancel()
        await asyncio.wait_for(small, 1)
        assert not await can_reserve(budget, 1)
    await second.__aexit__(None, None, None)
    assert await can_reserve(budget, budget.limit_bytes)


async def test_cancellation_while_granted_releases_the_bytes() -> None:
    budget = ByteBudget(10)
    holder = budget.reserve(10)
    await holder.__aenter__()
    waiting = asyncio.create_task(budget.reserve(10).__aenter__())
    await asyncio.sleep(0)
    await holder.__aexit__(None, None, None)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await can_reserve(budget, budget.limit_bytes)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3), st.booleans()), max_size=30))
def test_budget_is_never_exceeded_and_free_at_the_end(requests: list[tuple[int, int, bool]]) -> None:
    async def scenario() -> None:
        budget = ByteBudget(100)
        held = 0

        async def use(size: int, steps: int) -> None:
            nonlocal held
            async with budget.reserve(size):
                held += min(size, 100)
                assert held <= 100
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    held -= min(size, 100)

        tasks = []
        for size, steps, cancelled in requests:
            task = asyncio.create_task(use(size, steps))
            tasks.append(task)
            await asyncio.sleep(0)
            if cancelled:
                task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 5)
        assert await can_reserve(budget, budget.limit_bytes)

    asyncio.run(scenario())
