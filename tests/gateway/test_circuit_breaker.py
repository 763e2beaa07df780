"""The circuit breaker of a policy under attack: requests that an ordinary API key may make do not open it."""

import asyncio

import pytest

from services.core.values import Assessment, Detail, PreparedImage
from services.policies.document import PolicyDocument
from services.policies.rollout import Canary
from services.policies.tenants import TenantsDocument
from tests.support.gateway_bench import GatewayBench, data_url, unsafe

BAND = {"at_most": 0.1, "window_s": 60, "after": 10}
SHOP = PolicyDocument.model_validate({"name": "shop", "block_rate": BAND})


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return unsafe()


@pytest.mark.parametrize(
    ("tenant", "policy"),
    [("a", "shop"), ("a", "shop@1"), ("a", "shop@2"), ("b", "shop"), ("b", "default"), ("default", "shop")],
)
async def test_requests_of_a_key_open_no_breaker(idle: GatewayBench, tenant: str, policy: str) -> None:
    idle.guard.script = says_unsafe
    idle.registry.publish(SHOP)
    idle.registry.publish(SHOP.model_copy(update={"description": "the canary"}))
    idle.registry.activate("shop", 1, who="test")
    idle.registry.set_canary("shop", Canary(version=2, percent=50), who="test")
    idle.registry.publish(TenantsDocument(tenants={"b": "shop"}))
    idle.registry.activate("tenants", 1, who="test")
    await idle.start()
    before = idle.registry.list_changes("shop")
    async with idle.client(tenant=tenant) as client:
        for _ in range(3):  # the breaker is checked between them
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/v1/assessments?wait=20", json={"uri": data_url(), "policy": policy, "detail": "score"}
                    )
                    for _ in range(15)
                )
            )
            assert {answer.json()["action"] for answer in answers} == {"block"}
            await asyncio.sleep(0.6)
    assert idle.registry.list_changes("shop") == before
