import asyncio
from contextlib import suppress

import pytest

from services.core.errors import EngineFailed, GuardFailed, GuardUnavailable
from services.guard.slots import EngineSlots


class Engine:
    """Fails every call that runs together with a poison image."""

    def __init__(self, count: int, poison: frozenset[str] = frozenset()) -> None:
        self.slots = EngineSlots(count, self.health_check)
        self.poison = poison
        self.alive = True
        self.inside: set[str] = set()
        self.most = 0
        self.order: list[str] = []

    async def health_check(self) -> None:
        if not self.alive:
            raise GuardUnavailable("no sign of life")

    async def judge(self, image: str, priority: str = "live") -> str:
        async with self.slots.acquire(image, priority):
            self.inside.add(image)
            self.order.append(image)
            company = set(self.inside)
            self.most = max(self.most, len(company))
            try:
                for _ in range(3):
                    await asyncio.sleep(0)
                    company |= self.inside
            finally:
                self.inside.discard(image)
            if company & self.poison:
                raise EngineFailed("gone")
            return image

    async def patiently(self, image: str) -> str:
        while True:
            with suppress(EngineFailed):
                return await self.judge(image)


async def test_slots_concurrent_calls_stay_within_the_count() -> None:
    engine = Engine(3)
    await asyncio.gather(*(engine.judge(str(number)) for number in range(20)))
    assert engine.most == 3


async def test_slots_live_call_goes_before_backfill() -> None:
    engine = Engine(1)
    await asyncio.gather(
        engine.judge("first"),
        *(engine.judge(f"old-{number}", "backfill") for number in range(3)),
        *(engine.judge(f"new-{number}") for number in range(3)),
    )
    assert engine.order == ["first", "new-0", "new-1", "new-2", "old-0", "old-1", "old-2"]


async def test_slots_interactive_call_goes_before_all_streams() -> None:
    engine = Engine(1)
    await asyncio.gather(
        engine.judge("first"),
        *(engine.judge(f"old-{number}", "backfill") for number in range(2)),
        *(engine.judge(f"new-{number}", "live") for number in range(2)),
        *(engine.judge(f"now-{number}", "interactive") for number in range(2)),
    )
    assert engine.order == ["first", "now-0", "now-1", "new-0", "new-1", "old-0", "old-1"]


async def test_slots_engine_failures_fail_only_poison_images() -> None:
    engine = Engine(4, frozenset({"7", "8"}))
    async with asyncio.timeout(5):
        results = await asyncio.gather(*(engine.patiently(str(n)) for n in range(20)), return_exceptions=True)
    failed = [number for number, result in enumerate(results) if isinstance(result, GuardFailed)]
    assert failed == [7, 8]
    assert [result for result in results if isinstance(result, str)] == [str(n) for n in range(20) if n not in {7, 8}]


async def test_success_clears_a_suspected_image() -> None:
    engine = Engine(1, frozenset({"a"}))
    for _ in range(2):
        with pytest.raises(EngineFailed):
            await engine.judge("a")
    engine.poison = frozenset()
    await engine.judge("a")
    engine.poison = frozenset({"a"})
    with pytest.raises(EngineFailed):
        await engine.judge("a")


async def test_third_failure_confirms_a_poison_image() -> None:
    engine = Engine(1, frozenset({"a"}))
    for _ in range(2):
        with pytest.raises(EngineFailed):
            await engine.judge("a")
    with pytest.raises(GuardFailed, match="3 times"):
        await engine.judge("a")


async def test_failed_health_check_does_not_count_against_the_image() -> None:
    engine = Engine(1, frozenset({"a"}))
    with pytest.raises(EngineFailed):
        await engine.judge("a")
    engine.alive = False
    for _ in range(5):
        with pytest.raises(GuardUnavailable, match="no sign of life"):
            await engine.judge("a")
    engine.alive, engine.poison = True, frozenset()
    assert await engine.judge("a") == "a"


@pytest.mark.parametrize("suspect", [False, True])
async def test_cancelled_wait_leaves_the_slots_free(suspect: bool) -> None:
    engine = Engine(1)
    if suspect:
        engine.poison = frozenset({"late"})
        with pytest.raises(EngineFailed):
            await engine.judge("late")
        engine.poison = frozenset()
    async with engine.slots.acquire("busy"):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.judge("late"), 0.01)
    async with asyncio.timeout(1):
        assert await engine.judge("next") == "next"
        assert await engine.judge("later", "backfill") == "later"
