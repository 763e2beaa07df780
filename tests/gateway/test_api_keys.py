"""API keys: what is kept of them, how soon they are known and refused, and what an outage changes."""

import asyncio
import time
from typing import Any

import pytest

from services.core.errors import ConfigurationError, KeysUnavailable
from services.gateway import api_keys as keys
from services.gateway.api_keys import ApiKey, ApiKeyCache, ApiKeyRegistry
from services.gateway.problems import PREFIX
from tests.support.gateway_bench import Bench, data_url

REQUEST = {"input": {"type": "image_url", "image_url": {"url": data_url()}}}


class Bucket(ApiKeyRegistry):
    """Keys in memory; away when told so."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.revoked: set[str] = set()
        self.away = False
        self.looks = 0

    def add(self, **fields: Any) -> str:
        key_id, token = f"{len(self.keys):016x}", f"sk-sluice-{len(self.keys):016x}-{'a' * 43}"
        made = {"name": "n", "role": "moderate", "created_at": "2026-01-01", "digest": keys._digest(token)}
        self.keys[key_id] = ApiKey.model_validate(made | {"id": key_id} | fields)
        return token

    def read_index(self) -> dict[str, bool]:
        self.looks += 1
        if self.away:
            raise KeysUnavailable("away")
        return {key_id: key_id in self.revoked for key_id in self.keys}

    def get_each(self, key_ids: list[str]) -> list[ApiKey]:
        return [self.keys[key_id] for key_id in key_ids]


@pytest.mark.timeout(20)
async def test_whoever_asks_at_the_moment_in_which_a_look_ends_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody asks at every turn of the loop, so at that one, too."""
    monkeypatch.setattr(keys, "_SEARCH_S", 0.0)
    async with ApiKeyCache(Bucket(), refresh_s=60) as ring:
        asking = []
        for _ in range(8000):
            asking.append(asyncio.create_task(ring.find(f"sk-sluice-{'f' * 16}-{'a' * 43}")))
            await asyncio.sleep(0)
        assert set(await asyncio.gather(*asking)) == {None}


def test_nothing_is_kept_that_a_key_can_be_made_of(idle: Bench) -> None:
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


async def test_what_else_lies_among_the_keys_is_passed_over(idle: Bench, caplog: pytest.LogCaptureFixture) -> None:
    good, token = idle.keys.create("good", "moderate")
    gone, gone_token = idle.keys.create("gone", "moderate")
    idle.keys.revoke(gone.id)
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
        f"{copy}/key.json": gone.model_dump_json().encode(),
    }
    for name, data in stray.items():
        idle.s3.put_object(Bucket=idle.settings.policy_bucket, Key=f"keys/{name}", Body=data)
    assert idle.keys.read_index() == {good.id: False, gone.id: True, newer: False, broken: False, copy: False}
    assert {key.id for key in idle.keys.get_each(list(idle.keys.read_index()))} == {good.id, gone.id}
    assert all(f"the API key {key_id} is refused" in caplog.text for key_id in (newer, broken, copy))
    async with ApiKeyCache(idle.keys, refresh_s=3600) as ring:
        ring.check()
        assert await ring.find(token) == good
        assert await ring.find(gone_token) is None
        later, later_token = idle.keys.create("later", "moderate")
        assert await ring.find(later_token) == later
    idle.keys.revoke(newer)
    assert idle.keys.read_index()[newer], "a key that cannot be read can be revoked"


async def test_a_new_key_is_known_and_a_revoked_one_refused_within_seconds(bench: Bench) -> None:
    key, token = bench.keys.create("late", "moderate")
    async with bench.client(Authorization=f"Bearer {token}") as client:
        assert (await client.post("/v1/moderations", json=REQUEST)).status_code == 200
        bench.keys.revoke(key.id)
        revoked_at = time.monotonic()
        while (answer := await client.post("/v1/moderations", json=REQUEST)).status_code == 200:
            assert time.monotonic() - revoked_at < 60
            await asyncio.sleep(0.05)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_who_has_no_key(bench: Bench) -> None:
    token = bench.token()
    wrong = [token[:-1], token + "a", token[:-1] + ("a" if token[-1] != "a" else "b"), "x" * 10_000, "\u00e9", "a b"]
    async with bench.client() as client:
        for credentials in ["", "Basic YTph", "Bearer", "Bearer ", token, *(f"Bearer {each}" for each in wrong)]:
            headers = {"authorization": credentials.encode()}
            answer = await client.get("/v1/assessments/a", headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (401, f"{PREFIX}unauthenticated"), credentials
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_while_the_bucket_is_away_what_is_known_counts_for_a_while() -> None:
    bucket, now = Bucket(), 0.0
    token = bucket.add()
    async with ApiKeyCache(bucket, refresh_s=3600, clock=lambda: now) as ring:
        assert await ring.find(token)
        bucket.away = True
        now = 200.0
        assert await ring.find(token)
        now = 301.0
        with pytest.raises(KeysUnavailable):
            await ring.find(token)
        bucket.away = False
        unknown = bucket.add()
        assert await ring.find(unknown)
        assert await ring.find(token)


async def test_unknown_keys_share_a_look_at_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_SEARCH_S", 0.05)
    bucket = Bucket()
    async with ApiKeyCache(bucket, refresh_s=3600) as ring:
        before = bucket.looks
        made_up = [f"sk-sluice-{number:016x}-{'b' * 43}" for number in range(100)]
        assert await asyncio.gather(*(ring.find(token) for token in made_up)) == [None] * 100
        assert bucket.looks == before + 1
        token = bucket.add()
        assert await ring.find("not a key") is None
        assert bucket.looks == before + 1
        assert await ring.find(token)


async def test_a_revoked_key_goes_even_when_a_new_one_cannot_be_read() -> None:
    bucket, now = Bucket(), 0.0
    token = bucket.add()
    async with ApiKeyCache(bucket, refresh_s=3600, clock=lambda: now) as ring:
        assert await ring.find(token)
        bucket.revoked.add("0" * 16)
        other = bucket.add()
        bucket.get_each = _cannot  # type: ignore[method-assign]
        now = 1.0
        assert await ring.find(other) is None
        assert await ring.find(token) is None


def _cannot(_: list[str]) -> list[ApiKey]:
    raise KeysUnavailable("away")
