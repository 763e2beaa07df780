"""What the tests of an attacker with full write access to Redis share."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from redis.asyncio import Redis

from services.core import telemetry

HUGE_BYTES: Final = 48 << 20
_OUTPUT_LIMIT_BYTES: Final = 1 << 20


@pytest.fixture
def forgeries(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The forgeries that the metric counts, by kind."""
    counted = Counter[str]()

    def count(value: float, tags: dict[str, str]) -> None:
        counted[tags["kind"]] += int(value)

    monkeypatch.setattr(telemetry.REDIS_FORGERIES, "inc", count)
    return counted


@asynccontextmanager
async def little_is_sent(client: Redis) -> AsyncIterator[None]:
    """Fail if the server sends a huge value, or many small ones, to any client until the block ends."""
    before = (await client.info("stats"))["total_net_output_bytes"]
    yield
    sent = (await client.info("stats"))["total_net_output_bytes"] - before
    assert sent < _OUTPUT_LIMIT_BYTES, f"Redis has sent {sent} bytes"


async def run_on_server(client: Redis, script: str, *keys: str) -> None:
    """Run a Lua script of the attacker, in which `huge` is a value of `HUGE_BYTES`. `client` has the address."""
    options = client.connection_pool.connection_kwargs
    async with Redis(host=options["host"], port=options["port"]) as attacker:
        await attacker.eval(f"local huge = string.rep('1', {HUGE_BYTES}) {script}", len(keys), *keys)  # type: ignore[misc]
