"""Limits of one API key: images a second, concurrent requests and jobs, bytes and pixels."""

import asyncio
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from services.core.settings import Settings
from services.gateway.api_keys import ApiKey
from services.gateway.body_memory import BodyMemory
from services.gateway.problems import TYPE_PREFIX, HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.policies.redis_cache import PolicyRedisCache
from tests.support.gateway_bench import JPEG, Gate, GatewayBench, data_url

PATH = "/v1/assessments"
REQUEST = {"input": {"type": "image_url", "image_url": {"url": data_url()}}}


def key(**fields: Any) -> ApiKey:
    made = {"id": f"{random.getrandbits(64):016x}", "name": "n", "role": "admin", "digest": "", "created_at": 0}
    return ApiKey.model_validate(made | fields)


async def send(limiter: RateLimiter, key: ApiKey, count: int) -> int:
    """Send `count` requests at once. Returns how many the limit allows."""
    allowed = 0
    for _ in range(count):
        with suppress(HttpProblem):
            await limiter.acquire(key)
            allowed += 1
    return allowed


async def test_rate_counts_requests_to_all_gateways_together(valkey_url: str) -> None:
    shared = PolicyRedisCache(valkey_url, "rates")
    gateways = [RateLimiter(shared, Settings(gateway_rate_per_s=0.01)) for _ in range(2)]
    mine, own_rate = key(), key(rate_per_s=0.02)
    assert [await send(gateway, mine, 3) for gateway in gateways] == [2, 0], "one now, one in advance"
    assert [await send(gateway, own_rate, 3) for gateway in gateways] == [2, 0]
    assert await send(gateways[1], key(), 1) == 1, "another key has its own rate"
    await shared.close()


async def test_rate_without_redis_is_counted_by_each_gateway() -> None:
    now = 0.0
    shared = PolicyRedisCache("redis://127.0.0.1:1/0", "rates")
    limiter = RateLimiter(shared, Settings(gateway_rate_per_s=1), lambda: now)
    mine = key()
    assert await send(limiter, mine, 10) == 3, "two seconds of the rate at once, and the request that is due"
    now = 1.0
    assert await send(limiter, mine, 10) == 1
    await shared.close()


async def test_flood_of_one_key_is_refused_without_asking_redis(valkey_url: str) -> None:
    now = 0.0
    shared = PolicyRedisCache(valkey_url, "rates")
    limiter = RateLimiter(shared, Settings(gateway_rate_per_s=0.01), lambda: now)
    mine = key()
    assert await send(limiter, mine, 3) == 2
    await shared.close()
    shared.run = None  # type: ignore[method-assign, assignment]  # whoever asks fails
    assert await send(limiter, mine, 1000) == 0
    now = 101.0
    with pytest.raises(TypeError):
        await limiter.acquire(mine)


@pytest.mark.parametrize("forged", ["9e15", "inf", "nan", "-inf", "garbage"])
async def test_forged_due_time_refuses_no_longer_than_the_rate(valkey_url: str, forged: str) -> None:
    now = 0.0
    shared = PolicyRedisCache(valkey_url, "rates")
    limiter = RateLimiter(shared, Settings(gateway_rate_per_s=2), lambda: now)
    mine = key()
    await shared.client.set(shared.key("gateway", "rate", mine.id), forged)
    with suppress(HttpProblem):
        await limiter.acquire(mine)
    assert await send(limiter, mine, 10) <= 6
    await shared.client.delete(shared.key("gateway", "rate", mine.id))  # the attacker is gone
    now = 0.6
    assert await send(limiter, mine, 1) == 1
    await shared.close()


@pytest.mark.parametrize("forged", ["9e15", "inf"])
async def test_forged_due_time_is_replaced_by_the_latest_possible_one(valkey_url: str, forged: str) -> None:
    """It refuses the key once: for the burst, the image, and 15 images of each concurrent request of two gateways."""
    shared = PolicyRedisCache(valkey_url, "rates")
    limiter = RateLimiter(shared, Settings(gateway_rate_per_s=100, gateway_concurrency=3, gateway_replicas=2))
    mine, longest_s = key(), 2 + 0.01 * (1 + 6 * 15)
    name = shared.key("gateway", "rate", mine.id)
    await shared.client.set(name, forged)
    with pytest.raises(HttpProblem) as refused:
        await limiter.acquire(mine)
    assert refused.value.retry_after_s == pytest.approx(longest_s - 2, abs=0.05)
    assert 0 < await shared.client.ttl(name) <= longest_s + 2
    await asyncio.sleep(longest_s - 2 + 0.1)
    assert await send(limiter, mine, 1) == 1, "without any help"
    await shared.close()


async def test_concurrent_requests_with_most_images_count_in_full(valkey_url: str) -> None:
    """What legitimate requests have counted is never cut: neither in Redis nor in what the client is told."""
    now = 0.0
    shared = PolicyRedisCache(valkey_url, "rates")
    limiter = RateLimiter(shared, Settings(gateway_rate_per_s=1, gateway_concurrency=3), lambda: now)
    mine = key()
    assert await send(limiter, mine, 3) == 3, "two seconds of the rate at once, and the request that is due"
    for _ in range(3):
        await limiter.charge(mine, 15)
    for now in (0.0, 0.5, 1.5):  # asked, remembered, asked again: Redis has its own clock, which did not move on
        with pytest.raises(HttpProblem) as refused:
            await limiter.acquire(mine)
        assert refused.value.retry_after_s == pytest.approx(46 - now % 1.5, abs=1)
    await shared.close()


async def test_request_over_the_rate_is_a_429_with_retry_after(idle: GatewayBench) -> None:
    idle.configure(gateway_rate_per_s=0.1)
    await idle.start()
    async with idle.client() as client:
        answers = [await client.get(f"{PATH}/a") for _ in range(3)]
        openai = await client.post("/v1/moderations", json=REQUEST)
    assert [answer.status_code for answer in answers] == [404, 404, 429]
    assert answers[-1].json()["type"] == f"{TYPE_PREFIX}rate-limited"
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert (openai.status_code, openai.json()["error"]["type"]) == (429, "rate_limit_error")
    assert openai.json()["error"]["code"] == "rate_limit_exceeded"


async def test_concurrent_requests_and_jobs_over_the_limit_are_refused(idle: GatewayBench) -> None:
    idle.configure(gateway_concurrency=3)
    await idle.start()
    gate = idle.guard.script = Gate()
    files = {"file": ("a.jpg", JPEG)}
    async with idle.client() as client, idle.client(tenant="other") as neighbour:
        waiting = [asyncio.create_task(client.post(f"{PATH}?wait=20", files=files)) for _ in range(3)]
        await gate.wait_for_calls(3)
        refused = await client.post(f"{PATH}?wait=20", files=files)
        assert (refused.status_code, refused.json()["type"]) == (429, f"{TYPE_PREFIX}too-many-at-once")
        assert refused.headers["retry-after"]
        jobs = [await neighbour.post(PATH, files=files, headers={"Idempotency-Key": f"{n}"}) for n in range(5)]
        assert [job.status_code for job in jobs] == [202, 202, 202, 429, 429], "jobs have a count of their own"
        gate.opened.set()
        assert [(await answer).status_code for answer in waiting] == [200] * 3
        again = await neighbour.post(f"{PATH}?wait=20", files=files, headers={"Idempotency-Key": "4"})
        assert again.status_code == 200, "the idempotency key of a refused request can be used again"
    assert gate.calls == 7


async def test_images_over_the_limit_of_the_gateway_are_refused(idle: GatewayBench) -> None:
    idle.configure(gateway_in_flight=2)
    await idle.start()
    gate = idle.guard.script = Gate()
    async with idle.client() as client, idle.client(tenant="b") as second, idle.client(tenant="other") as neighbour:
        waiting = [asyncio.create_task(each.post("/v1/moderations", json=REQUEST)) for each in (client, second)]
        await gate.wait_for_calls(2)
        refused = await neighbour.post("/v1/moderations", json=REQUEST)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        gate.opened.set()
        assert [(await answer).status_code for answer in waiting] == [200] * 2


async def test_request_without_a_verdict_within_the_deadline_is_a_503(idle: GatewayBench) -> None:
    idle.configure(gateway_deadline_s=0.2)
    await idle.start()
    idle.guard.script = Gate()
    async with idle.client() as client:
        answer = await client.post(f"{PATH}?wait=20", files={"file": ("a.jpg", JPEG)})
        openai = await client.post("/v1/moderations", json=REQUEST)
    assert (answer.status_code, answer.json()["type"]) == (503, f"{TYPE_PREFIX}unavailable")
    assert answer.headers["retry-after"]
    assert (openai.status_code, openai.json()["error"]["type"]) == (503, "server_error")


async def test_body_without_a_length_over_the_limit_is_refused_while_it_arrives(bench: GatewayBench) -> None:
    limit = bench.settings.gateway_body_limit_bytes
    sent = 0

    async def endless(size: int) -> AsyncIterator[bytes]:
        nonlocal sent
        sent = 0
        while sent < size:
            sent += 1 << 16
            yield b" " * (1 << 16)

    json = {"content-type": "application/json"}
    async with bench.client() as client, bench.client("admin") as admin:
        for refused in (
            await client.post("/v1/moderations", content=b" " * (limit + 1), headers=json),
            await client.post("/v1/moderations", content=endless(8 * limit), headers=json),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert sent <= 6 * limit, "what is not kept is not read for ever either"
        for path, content, each_client in (
            (PATH, endless(8 * limit), client),
            ("/v1/policies", endless(8 * limit), admin),
            ("/v1/policies/default/activate", endless(8 * limit), admin),
        ):
            answer = await each_client.post(path, content=content, headers=json)
            assert (answer.status_code, answer.json()["type"]) == (413, f"{TYPE_PREFIX}body-too-large")
        file = {"file": ("a.jpg", b"\xff\xd8\xff" + b"\0" * limit)}
        assert (await client.post(PATH, files=file)).json()["type"] == f"{TYPE_PREFIX}body-too-large"


async def test_image_with_few_bytes_and_too_many_pixels_is_refused(bench: GatewayBench) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4) + b"\0\0\0\0IEND\xaeB`\x82"
    async with bench.client() as client:
        answer = await client.post(f"{PATH}?wait=20", files={"file": ("a.png", bomb)})
    assert (answer.status_code, answer.json()["type"]) == (413, f"{TYPE_PREFIX}image-too-large")


def test_memory_of_one_key_is_limited_to_a_quarter() -> None:
    memory = BodyMemory(100)
    with memory.lease("a") as first, memory.lease("a") as second, memory.lease("b") as other:
        first.reserve(20)
        with pytest.raises(HttpProblem, match="this API key"):
            second.reserve(6)
        second.reserve(5)
        for name in "bcd":
            memory.reserve(name, 25)
        assert memory.used_bytes == 100
        with pytest.raises(HttpProblem, match="no memory left"):
            memory.reserve("e", 1)
        for name in "bcd":
            memory.release(name, 25)
        other.reserve(25)
    assert memory.used_bytes == 0


async def test_one_key_with_many_images_gets_a_quarter_of_the_places(idle: GatewayBench) -> None:
    """The key sends more images than the gateway judges at a time. Another key and the readiness do not notice."""
    idle.configure(gateway_in_flight=16, gateway_concurrency=32, gateway_rate_per_s=10_000)
    await idle.start()
    gate = idle.guard.script = Gate()
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    async with idle.client() as client, idle.client(tenant="other") as neighbour:
        flood = [asyncio.create_task(client.post("/v1/moderations", json={"input": [image] * 16})) for _ in range(8)]
        await gate.wait_for_calls(4)
        await asyncio.sleep(0.5)
        assert gate.calls == 4
        served = asyncio.create_task(neighbour.post("/v1/moderations", json=REQUEST))
        await gate.wait_for_calls(5)
        await idle.app.state.readiness.refresh()
        assert (await client.get("/readyz")).status_code == 200
        gate.opened.set()
        assert (await served).status_code == 200
        answers = [await each for each in flood]
    codes = {answer.json()["error"]["code"] for answer in answers if answer.status_code != 200}
    assert codes <= {"too_many_at_once"}


async def test_images_of_one_request_count_against_the_rate(idle: GatewayBench) -> None:
    idle.configure(gateway_rate_per_s=0.1)
    await idle.start()
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    async with idle.client() as client:
        assert (await client.post("/v1/moderations", json={"input": [image] * 16})).status_code == 200
        refused = await client.post("/v1/moderations", json=REQUEST)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 10


async def test_request_judges_as_many_images_at_a_time_as_its_key_has_requests_free(idle: GatewayBench) -> None:
    idle.configure(gateway_concurrency=2, gateway_in_flight=128)
    await idle.start()
    gate = idle.guard.script = Gate()
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    async with idle.client() as client:
        request = asyncio.create_task(client.post("/v1/moderations", json={"input": [image] * 16}))
        await gate.wait_for_calls(2)
        await asyncio.sleep(0.3)
        assert gate.calls == 2
        assert (await client.post("/v1/moderations", json=REQUEST)).status_code == 429
        gate.opened.set()
        assert (await request).status_code == 200
