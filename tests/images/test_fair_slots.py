"""Decoders are shared by tenants in turn."""

import asyncio
from pathlib import Path

from services.core.tenant_context import work_for_tenant
from services.core.values import PreparedImage
from services.images.decoder_pool import DecoderPool
from services.images.fair_slots import FairSlots
from tests.images.test_decoder_pool import BAD, GOOD, decoders, misbehave
from tests.support.images import make_settings

__all__ = ["decoders"]


async def test_tenants_get_slots_in_turn() -> None:
    slots, order = FairSlots(1), []
    await slots.acquire("a")

    async def call(tenant: str) -> None:
        await slots.acquire(tenant)
        order.append(tenant)
        slots.release()

    tasks = [asyncio.create_task(call(tenant)) for tenant in "aaaaabbc"]
    await asyncio.sleep(0)
    slots.release()
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcabaaa"


async def test_cancelled_calls_lose_no_slot() -> None:
    slots = FairSlots(1)
    await slots.acquire("a")
    waiting = asyncio.create_task(slots.acquire("a"))
    granted = asyncio.create_task(slots.acquire("b"))
    await asyncio.sleep(0)
    waiting.cancel()
    slots.release()  # `waiting` is cancelled already, so `granted` gets the slot
    granted.cancel()
    await asyncio.gather(waiting, granted, return_exceptions=True)
    await asyncio.wait_for(slots.acquire("c"), 1)


async def test_tenant_with_many_slow_images_delays_another_by_one(decoders: Path) -> None:
    misbehave(decoders, "time.sleep(0.5)")
    preparer = DecoderPool(make_settings(decode_workers=1), 512)

    async def prepare(tenant: str, data: bytes) -> PreparedImage:
        with work_for_tenant(tenant):
            return await preparer.prepare(data)

    try:
        await prepare("victim", GOOD)
        attacks = [asyncio.create_task(prepare("attacker", BAD)) for _ in range(10)]
        await asyncio.sleep(0.1)
        await prepare("victim", GOOD)
        assert sum(attack.done() for attack in attacks) <= 2
        await asyncio.gather(*attacks)
    finally:
        preparer.close()
