"""The circuit breaker of a policy under attack from the stream: another tenant does not open it, its own tenants do."""

import asyncio

from services.core.values import CATEGORIES, Assessment, Detail, PreparedImage
from services.policies.document import PolicyDocument
from services.policies.tenants import TenantsDocument
from tests.support.fake_guard import MODEL
from tests.support.intake_bench import IntakeBench
from tests.support.streams_bench import eventually

BAND = {"at_most": 0.1, "window_s": 60, "after": 10}


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return Assessment(rating="Unsafe", category=CATEGORIES[1], rationale="a fight", score=0.9, model=MODEL)


async def test_invented_tenants_open_no_breaker_if_tenants_are_separated(bench: IntakeBench) -> None:
    bench.guard.script = says_unsafe
    bench.registry.publish(PolicyDocument.model_validate({"name": "default", "block_rate": BAND}))
    bench.registry.activate("default", 2, who="test")
    before = bench.registry.list_changes("default")
    bench.put("b/fight.jpg")
    await bench.start(tenant_prefixes=("b=s3://uploads/b/",))
    for number in range(40):
        await bench.submit({"id": str(number), "uri": "s3://uploads/b/fight.jpg", "tenant": f"made-up-{number}"})
    verdicts, letters = await bench.settled(40)
    assert (verdicts, {letter.reason for letter in letters}) == ([], {"forbidden"})
    await asyncio.sleep(1)  # the breaker is checked four times a second
    assert bench.registry.list_changes("default") == before


async def test_only_submissions_of_own_tenants_open_the_breaker(bench: IntakeBench) -> None:
    bench.guard.script = says_unsafe
    bench.registry.publish(PolicyDocument.model_validate({"name": "shop", "block_rate": BAND}))
    bench.registry.activate("shop", 1, who="test")
    bench.registry.publish(TenantsDocument(tenants={"b": "shop"}))
    bench.registry.activate("tenants", 1, who="test")
    bench.put("fight.jpg")
    await bench.start()

    async def submit(name: str, tenant: str, policy: str) -> None:
        await bench.submit({"id": name, "uri": "s3://uploads/fight.jpg", "tenant": tenant, "policy": policy})

    for number in range(15):
        await submit(f"foreign-{number}", "a", "shop")
        await submit(f"unlisted-{number}", "default", "shop")
        await submit(f"pinned-{number}", "b", "shop@1")
    verdicts, letters = await bench.settled(45)
    assert letters == []
    await asyncio.sleep(1)  # the breaker is checked four times a second
    assert [change.action for change in bench.registry.list_changes("shop")] == ["activate"]
    assert {verdict.action for verdict in verdicts} == {"block"}
    for number in range(15):
        await submit(f"own-{number}", "b", "default")

    async def is_tripped() -> bool:
        return [change.action for change in bench.registry.list_changes("shop")] == ["activate", "trip"]

    await eventually(is_tripped)
