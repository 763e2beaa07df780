"""API keys: their objects in the bucket, how soon new and revoked keys are noticed, and outages of the bucket."""

import asyncio
from typing import Any

import pytest

from services.core.errors import ApiKeysUnavailable, ConfigurationError
from services.core.tenancy import Tenancy
from services.gateway.api_key_cache import ApiKeyCache
from services.gateway.api_keys import ApiKey, ApiKeyRegistry, digest_token
from services.gateway.problems import TYPE_PREFIX, HttpProblem
from tests.support.gateway_bench import GatewayBench, data_url

REQUEST = {"input": {"type": "image_url", "image_url": {"url": data_url()}}}


class FakeRegistry(ApiKeyRegistry):
    """Keys in memory. While `is_down` is set, reads fail."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.revoked: set[str] = set()
        self.is_down = False
        self.reads = 0

    def add(self, **fields: Any) -> str:
        key_id, token = f"{len(self.keys):016x}", f"sk-sluice-{len(self.keys):016x}-{'a' * 43}"
        made = {"name": "n", "role": "moderate", "created_at": "2026-01-01", "digest": digest_token(token)}
        self.keys[key_id] = ApiKey.model_validate(made | {"id": key_id} | fields)
        return token

    def read_index(self) -> dict[str, bool]:
        self.reads += 1
        if self.is_down:
            raise ApiKeysUnavailable("the bucket is down")
        return {key_id: key_id in self.revoked for key_id in self.keys}

    def get_each(self, key_ids: list[str]) -> list[ApiKey]:
        return [self.keys[key_id] for key_id in key_ids]


class NotingCache(ApiKeyCache):
    """Notes each refresh, also a failed one."""

    def __init__(self, registry: ApiKeyRegistry, *, refresh_s: float) -> None:
        super().__init__(registry, refresh_s=refresh_s, unknown_key_pause_s=0.0, max_unknown_keys=10_000)
        self._refreshed = asyncio.Event()

    async def refresh(self) -> None:
        try:
            await super().refresh()
        finally:
            self._refreshed.set()

    async def wait_for_refresh(self) -> None:
        """Wait until a refresh that starts after this call has ended."""
        for _ in range(2):  # the first may have started before
            self._refreshed.clear()
            async with asyncio.timeout(10):
                await self._refreshed.wait()


@pytest.mark.timeout(20)
async def test_find_of_unknown_keys_while_refreshes_end_does_not_block_the_loop() -> None:
    """A `find` starts in each iteration of the event loop, so one starts in the iteration in which a refresh ends."""
    async with ApiKeyCache(FakeRegistry(), refresh_s=60, unknown_key_pause_s=0.0, max_unknown_keys=10_000) as cache:
        asking = []
        for _ in range(8000):
            asking.append(asyncio.create_task(cache.find(f"sk-sluice-{'f' * 16}-{'a' * 43}")))
            await asyncio.sleep(0)
        assert set(await asyncio.gather(*asking)) == {None}


def test_created_key_is_stored_without_its_token_and_can_be_revoked(idle: GatewayBench) -> None:
    key, token = idle.keys.create("ci", "review", tenant="shop", rate_per_s=5, concurrency=2, who="ada")
    objects = idle.s3.list_objects_v2(Bucket=idle.settings.policy_bucket, Prefix="keys/")["Contents"]
    (path,) = [each["Key"] for each in objects]
    body = idle.s3.get_object(Bucket=idle.settings.policy_bucket, Key=path)["Body"].read().decode()
    assert token.rpartition("-")[2] not in body
    assert token not in body
    assert idle.keys.get(key.id) == key
    assert (key.role, key.tenant, key.created_by) == ("review", "shop", "ada")
    assert idle.keys.read_index() == {key.id: False}
    for _ in range(2):
        idle.keys.revoke(key.id)
    assert idle.keys.read_index() == {key.id: True}
    for wrong in ("", "nothing", "0" * 16, "../../policies"):
        with pytest.raises(ConfigurationError):
            idle.keys.revoke(wrong)
    with pytest.raises(ConfigurationError, match="name"):
        idle.keys.create("", "admin")


def test_scope_of_a_key_is_stored_also_if_it_allows_nothing(idle: GatewayBench) -> None:
    for fields in ({}, {"prefixes": [], "policies": []}, {"prefixes": ["s3://uploads/"], "all_tenants": True}):
        key, _ = idle.keys.create("ci", "moderate", **fields)
        assert idle.keys.get(key.id) == key
        scope = key.find_scope(Tenancy())
        assert scope.allows_object("uploads", "cat.jpg") is (fields.get("prefixes") != [])
        assert scope.has_policy_limit is ("policies" in fields)


async def test_other_and_invalid_objects_among_the_keys_are_ignored(
    idle: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    good, token = idle.keys.create("good", "moderate")
    revoked, revoked_token = idle.keys.create("revoked", "moderate")
    idle.keys.revoke(revoked.id)
    newer, broken, copy, alone = (f"{number:016x}" for number in range(4))
    body = good.model_dump_json()
    stray = {
        "": b"",
        "README": b"",
        f"{alone}/": b"",
        f"{alone}/revoked.json": b"{}",
        f"{good.id}/revoked.json.bak": b"{}",
        f"{good.id}/old/revoked.json": b"{}",
        f"{newer}/key.json": body.replace(good.id, newer).replace('"moderate"', '"audit"').encode(),
        f"{broken}/key.json": b"\xff{",
        f"{copy}/key.json": revoked.model_dump_json().encode(),
    }
    for name, data in stray.items():
        idle.s3.put_object(Bucket=idle.settings.policy_bucket, Key=f"keys/{name}", Body=data)
    assert idle.keys.read_index() == {good.id: False, revoked.id: True, newer: False, broken: False, copy: False}
    assert {key.id for key in idle.keys.get_each(list(idle.keys.read_index()))} == {good.id, revoked.id}
    assert all(f"the API key {key_id} is refused" in caplog.text for key_id in (newer, broken, copy))
    async with ApiKeyCache(idle.keys, refresh_s=3600) as cache:
        cache.raise_if_stale()
        assert await cache.find(token) == good
        assert await cache.find(revoked_token) is None
        later, later_token = idle.keys.create("later", "moderate")
        assert await cache.find(later_token) == later
    idle.keys.revoke(newer)
    assert idle.keys.read_index()[newer], "a key with an invalid object can be revoked"


async def test_new_key_is_accepted_and_revoked_key_is_refused_after_a_refresh(bench: GatewayBench) -> None:
    key, token = bench.keys.create("late", "moderate")
    async with bench.client(Authorization=f"Bearer {token}") as client:
        assert (await client.post("/v1/moderations", json=REQUEST)).status_code == 200
        bench.keys.revoke(key.id)
        for _ in range(2):  # the first may be one that had started before the revocation
            await bench.app.state.api_keys.refresh()
        answer = await client.post("/v1/moderations", json=REQUEST)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_cache_refreshes_periodically_also_after_an_outage() -> None:
    bucket = FakeRegistry()
    token = bucket.add()
    async with NotingCache(bucket, refresh_s=0.01) as cache:
        bucket.is_down = True
        await cache.wait_for_refresh()
        bucket.is_down = False
        bucket.revoked.add("0" * 16)
        await cache.wait_for_refresh()
        assert await cache.find(token) is None


async def test_request_without_a_valid_key_is_unauthenticated(bench: GatewayBench) -> None:
    token = bench.token()
    wrong = [token[:-1], token + "a", token[:-1] + ("a" if token[-1] != "a" else "b"), "x" * 10_000, "\u00e9", "a b"]
    async with bench.client() as client:
        for credentials in ["", "Basic YTph", "Bearer", "Bearer ", token, *(f"Bearer {each}" for each in wrong)]:
            headers = {"authorization": credentials.encode()}
            answer = await client.get("/v1/assessments/a", headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (401, f"{TYPE_PREFIX}unauthenticated"), credentials
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_cached_keys_stay_valid_for_minutes_while_the_bucket_is_down() -> None:
    bucket, now = FakeRegistry(), 0.0
    token = bucket.add()
    async with ApiKeyCache(bucket, refresh_s=3600, clock=lambda: now) as cache:
        assert await cache.find(token)
        bucket.is_down = True
        now = 200.0
        assert await cache.find(token)
        now = 301.0
        with pytest.raises(ApiKeysUnavailable):
            await cache.find(token)
        bucket.is_down = False
        unknown = bucket.add()
        assert await cache.find(unknown)
        assert await cache.find(token)


async def test_finds_of_unknown_keys_share_one_refresh() -> None:
    bucket = FakeRegistry()
    async with ApiKeyCache(bucket, refresh_s=3600, unknown_key_pause_s=0.05, max_unknown_keys=100) as cache:
        before = bucket.reads
        made_up = [f"sk-sluice-{number:016x}-{'b' * 43}" for number in range(100)]
        assert await asyncio.gather(*(cache.find(token) for token in made_up)) == [None] * 100
        assert bucket.reads == before + 1
        token = bucket.add()
        assert await cache.find("not a key") is None
        assert bucket.reads == before + 1
        assert await cache.find(token)


async def test_revoked_key_is_refused_though_a_new_key_cannot_be_read() -> None:
    bucket, now = FakeRegistry(), 0.0
    token = bucket.add()
    async with ApiKeyCache(bucket, refresh_s=3600, clock=lambda: now) as cache:
        assert await cache.find(token)
        bucket.revoked.add("0" * 16)
        other = bucket.add()
        bucket.get_each = _fail  # type: ignore[method-assign]
        now = 1.0
        assert await cache.find(other) is None
        assert await cache.find(token) is None


def _fail(_: list[str]) -> list[ApiKey]:
    raise ApiKeysUnavailable("the bucket is down")


async def test_unknown_keys_over_the_bound_are_refused_at_once_but_known_keys_are_found() -> None:
    bucket = FakeRegistry()
    token = bucket.add()
    async with ApiKeyCache(bucket, refresh_s=3600, unknown_key_pause_s=0.3, max_unknown_keys=3) as cache:
        made_up = [f"sk-sluice-{number:016x}-{'b' * 43}" for number in range(100, 110)]
        results = await asyncio.gather(*(cache.find(each) for each in made_up), return_exceptions=True)
        assert results[:3] == [None] * 3
        assert {type(each) for each in results[3:]} == {HttpProblem}
        assert await cache.find(token)
        assert await cache.find(made_up[0]) is None, "the places are free again"
