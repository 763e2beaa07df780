"""An attacker with full write access to Redis changes no verdict, and is noticed."""

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial

import pytest
from pydantic import SecretStr

from services.core.errors import PolicyUnavailable
from services.core.messages import Submission
from services.core.tasks import cancel_and_wait
from services.core.values import Policy
from services.policies import cache as policy_cache
from services.policies.cache import PolicyCache
from services.policies.document import PolicyDocument
from services.policies.redis_cache import ENTRY_LIMIT_BYTES, UNSIGNED_LIMIT_BYTES, PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, Rollout, RolloutChange
from services.policies.service import PolicyService
from tests.support.policies import SIGNING_KEY, CountingRegistry, becomes, unreachable, wait_for_listeners
from tests.support.redis_attacks import run_on_server

STRICT = PolicyDocument(name="default")
LENIENT = PolicyDocument.model_validate({"name": "default", "thresholds": {"review": 1.0, "block": 1.0}})
FORGED = StoredVersion("default", 2, LENIENT.digest(), LENIENT)


def forged_change(number: int = 90_000_000, action: str = "activate") -> RolloutChange:
    rollout = Rollout(active=2, since=number, digests={2: LENIENT.digest()})
    if action == "trip":
        rollout = Rollout(active=1, since=number, tripped=frozenset({1, 2, 3}), digests={1: STRICT.digest()})
    return RolloutChange.model_validate(
        {
            "name": "default",
            "number": number,
            "action": action,
            "to": 2,
            "who": "mallory",
            "at": "2026-11-21T10:00:00Z",
            "rollout": rollout,
        }
    )


class Attacker:
    """Writes to Redis what a process would write, without the key, or with a key of its own."""

    def __init__(self, shared: PolicyRedisCache, url: str, bucket: str) -> None:
        self.client = shared.client
        self.key = shared.key
        self.own = PolicyRedisCache(url, bucket, signing_key=SecretStr("x" * 32))

    async def forge(self, change: RolloutChange, *, keep_signature: bool = False) -> None:
        name = change.name
        await self.own.cache_version(FORGED)
        signed = await self.client.hmget(self.key("rollout", name), "signed_ms", "signature")
        await self.own.publish_change(name, change, even_if_older=True)
        if keep_signature and signed[1]:
            await self.client.hset(self.key("rollout", name), mapping={"signed_ms": signed[0], "signature": signed[1]})
        await self.client.hset(self.key("rollout", name), "checked_ms", 9_000_000_000_000)
        await self.client.publish(self.key("changes"), change.model_dump_json(by_alias=True))


@pytest.fixture(params=[None, SIGNING_KEY], ids=["no key", "key"])
async def shared(
    registry: PolicyRegistry, valkey_url: str, request: pytest.FixtureRequest
) -> AsyncIterator[PolicyRedisCache]:
    registry.publish(STRICT)
    registry.activate("default", 1, who="ann")
    copies = PolicyRedisCache(valkey_url, registry.bucket, signing_key=request.param)
    yield copies
    await copies.close()


@pytest.fixture
async def attacker(shared: PolicyRedisCache, registry: PolicyRegistry, valkey_url: str) -> AsyncIterator[Attacker]:
    attacker = Attacker(shared, valkey_url, registry.bucket)
    yield attacker
    await attacker.own.close()


async def judging_policy(cache: PolicyCache, reference: str = "default") -> Policy:
    return (await cache.choose(Submission(id=uuid.uuid4().hex, uri="s3://a/b", policy=reference))).policy


async def counted(forgeries: Counter[str], kind: str) -> None:
    async def seen() -> bool:
        return forgeries[kind] > 0

    await becomes(True, seen)


async def test_forged_announcement_changes_no_verdict_and_activate_wins(
    registry: PolicyRegistry,
    shared: PolicyRedisCache,
    attacker: Attacker,
    forgeries: Counter[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        await judging_policy(cache)
        await wait_for_listeners(shared, 1)
        await attacker.forge(forged_change())
        await counted(forgeries, "announcement")
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()
        assert "FORGERY IN REDIS" in caplog.text

        stricter = PolicyDocument(name="default", description="stricter")
        service = PolicyService(registry, shared)
        published = await service.publish(stricter)
        await attacker.forge(forged_change())
        await service.activate("default", published.version, who="ann")
        await becomes(published.version, lambda: _version(cache))
        assert (await judging_policy(cache)).identity.digest == stricter.digest()


@pytest.mark.parametrize("action", ["activate", "trip"])
async def test_activate_wins_while_an_attacker_keeps_writing_a_newer_change(
    registry: PolicyRegistry, shared: PolicyRedisCache, attacker: Attacker, forgeries: Counter[str], action: str
) -> None:
    stricter = PolicyDocument(name="default", description="stricter")
    registry.publish(stricter)
    service = PolicyService(registry, shared)

    async def attack() -> None:
        while True:
            await attacker.forge(forged_change(action=action))
            await asyncio.sleep(0.01)

    async with (
        PolicyCache(registry, shared, refresh_s=0.5) as refreshing,
        PolicyCache(registry, shared, refresh_s=600) as listening,
    ):
        running = [refreshing, listening]
        for cache in running:
            await judging_policy(cache)
        await wait_for_listeners(shared, 2)
        attacking = asyncio.create_task(attack())
        try:
            for version in (2, 1):
                await service.activate("default", version, who="ann")
                async with PolicyCache(registry, shared, refresh_s=600) as new:
                    for cache in (*running, new):
                        await becomes(version, partial(_version, cache))
                        assert not cache.is_tripped((await judging_policy(cache)).identity)
        finally:
            await cancel_and_wait(attacking)
    assert [change.who for change in registry.list_changes("default")] == ["ann"] * 3
    assert forgeries["announcement"] + forgeries["rollout"] > 0


async def test_author_without_the_key_is_no_forger(
    registry: PolicyRegistry, valkey_url: str, forgeries: Counter[str]
) -> None:
    """A command may lack the key that the processes of the service have."""
    registry.publish(STRICT)
    registry.activate("default", 1, who="ann")
    shared = PolicyRedisCache(valkey_url, registry.bucket, signing_key=SIGNING_KEY)
    unsigned = PolicyRedisCache(valkey_url, registry.bucket)
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        await judging_policy(cache)
        await wait_for_listeners(shared, 1)
        service = PolicyService(registry, unsigned)
        published = await service.publish(PolicyDocument(name="default", description="stricter"))
        await service.activate("default", published.version, who="ann")
        await becomes(published.version, lambda: _version(cache))
        entry = await shared.find_newest_change("default")
        assert entry is not None
        assert entry.is_signed
    assert not forgeries
    await unsigned.close()
    await shared.close()


async def _version(cache: PolicyCache) -> int:
    return (await judging_policy(cache)).identity.version


@pytest.mark.parametrize("keep_signature", [False, True])
async def test_forged_rollout_changes_no_verdict_of_a_refresh_or_a_new_process(
    registry: PolicyRegistry,
    shared: PolicyRedisCache,
    attacker: Attacker,
    forgeries: Counter[str],
    keep_signature: bool,
) -> None:
    async with PolicyCache(registry, shared, refresh_s=0.2) as running:
        await judging_policy(running)

        async def is_noticed() -> bool:
            # A lookup that began before overwrites the entry without a look, so the attacker tries again and again.
            await attacker.forge(forged_change(), keep_signature=keep_signature)
            await asyncio.sleep(0.3)
            return forgeries["rollout"] > 0

        await becomes(True, is_noticed)
        await attacker.forge(forged_change(number=1), keep_signature=keep_signature)
        async with PolicyCache(registry, shared, refresh_s=600) as new:
            for cache in (running, new):
                assert (await judging_policy(cache)).identity.digest == STRICT.digest()


async def test_forged_version_is_not_used(
    registry: PolicyRegistry, shared: PolicyRedisCache, attacker: Attacker, forgeries: Counter[str]
) -> None:
    for reference in ("default", "default@1"):
        await attacker.own.cache_version(StoredVersion("default", 1, LENIENT.digest(), LENIENT))
        async with PolicyCache(registry, shared, refresh_s=600) as cache:
            assert (await judging_policy(cache, reference)).identity.digest == STRICT.digest()
    assert forgeries["version"] == 2


async def test_forged_entries_are_not_used_while_the_bucket_is_down(
    registry: PolicyRegistry, shared: PolicyRedisCache, attacker: Attacker
) -> None:
    async with PolicyCache(registry, shared, refresh_s=0.2) as running:
        await judging_policy(running)
        running._registry = unreachable()
        await attacker.forge(forged_change())
        async with PolicyCache(unreachable(), shared, refresh_s=600) as new:
            for reference in ("default", "default@2"):
                with pytest.raises(PolicyUnavailable):
                    await judging_policy(new, reference)
        await asyncio.sleep(1)
        assert (await judging_policy(running)).identity.digest == STRICT.digest()


async def test_new_process_takes_only_signed_copies_while_the_bucket_is_down(
    registry: PolicyRegistry, shared: PolicyRedisCache
) -> None:
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        await judging_policy(cache)
    async with PolicyCache(unreachable(), shared, refresh_s=600) as new:
        if shared.signer.can_sign:
            assert (await judging_policy(new)).identity.digest == STRICT.digest()
        else:
            with pytest.raises(PolicyUnavailable):
                await judging_policy(new)
            new._registry = registry  # the bucket is back
            assert (await judging_policy(new)).identity.digest == STRICT.digest()


async def test_earlier_signed_entry_that_is_written_again_is_not_used(
    registry: PolicyRegistry, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker kept an entry from before a change, and writes it again."""
    shared = PolicyRedisCache(valkey_url, registry.bucket, signing_key=SIGNING_KEY)
    for version in (1, 2):
        registry.publish(PolicyDocument(name="default", description=f"number {version}"))
        await shared.publish_change("default", registry.activate("default", version, who="ann"))
        if version == 1:
            kept = await shared.client.hgetall(shared.key("rollout", "default"))
    await shared.client.hset(shared.key("rollout", "default"), mapping=kept)
    await shared.client.hset(shared.key("rollout", "default"), "checked_ms", 9_000_000_000_000)
    now_s = time.time()
    monkeypatch.setattr("services.policies.redis_cache.time.time", lambda: now_s + 10)
    async with PolicyCache(registry, shared, refresh_s=5) as cache:
        assert await _version(cache) == 2
    await shared.close()


@pytest.mark.parametrize("age_s", [-3600.0, -1.0, 1.0, 3600.0])
async def test_age_of_a_signed_copy_is_clamped(
    registry: PolicyRegistry, valkey_url: str, monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    shared = PolicyRedisCache(valkey_url, registry.bucket, signing_key=SIGNING_KEY)
    await shared.publish_change("default", forged_change(7))
    now_s = time.time()
    monkeypatch.setattr("services.policies.redis_cache.time.time", lambda: now_s + age_s)
    entry = await shared.find_newest_change("default")
    assert entry is not None
    assert entry.is_signed
    assert entry.age_s == pytest.approx({-3600.0: float("inf"), -1.0: 0.0}.get(age_s, age_s), abs=0.5)
    await shared.close()


async def test_flood_of_announcements_causes_few_reads(
    registry: PolicyRegistry, shared: PolicyRedisCache, attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_cache, "_CHECK_PAUSE_S", 0.5)
    counting = CountingRegistry(registry)
    async with PolicyCache(counting, shared, refresh_s=600) as cache:
        await judging_policy(cache)
        await wait_for_listeners(shared, 1)
        counting.reads.clear()
        began_at = time.monotonic()
        for number in range(2000):
            body = forged_change(90_000_000 + number).model_dump_json(by_alias=True)
            await attacker.client.publish(shared.key("changes"), body)
            await attacker.client.publish(shared.key("changes"), json.dumps({"name": f"made-up-{number}"}))
        allowed = 2 * (2 + (time.monotonic() - began_at) / 0.5)
        await asyncio.sleep(0.1)
        assert 0 < counting.reads.total() <= allowed
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()


async def test_values_of_wrong_types_and_numbers_stop_nothing(
    registry: PolicyRegistry, shared: PolicyRedisCache, attacker: Attacker
) -> None:
    rollout, version = shared.key("rollout", "default"), shared.key("version", "default@1")
    await attacker.client.rpush(rollout, "x")
    await attacker.client.rpush(version, "x")
    async with PolicyCache(registry, shared, refresh_s=0.2) as cache:
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()
        for number in (b"garbage", b"nan", b"inf", b"-1"):
            await attacker.client.delete(rollout)
            await attacker.client.hset(rollout, mapping={"number": number, "change": b"{", "checked_ms": number})
            wanted = 2 if number in (b"nan", b"garbage") else 1
            await asyncio.to_thread(registry.publish, STRICT)
            change = await PolicyService(registry, shared).activate("default", wanted, who="ann")
            assert change.version == wanted
            await becomes(wanted, lambda: _version(cache))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every copy or announcement that is parsed, and every change and version of the bucket."""
    seen: list[bytes] = []
    parse_change, parse_version = RolloutChange.model_validate_json, StoredVersion.from_json

    def note_change(body: bytes) -> RolloutChange:
        seen.append(body)
        return parse_change(body)

    def note_version(name: str, version: int, body: bytes) -> StoredVersion:
        seen.append(body)
        return parse_version(name, version, body)

    monkeypatch.setattr(RolloutChange, "model_validate_json", note_change)
    monkeypatch.setattr(StoredVersion, "from_json", note_version)
    return seen


SIZES = pytest.mark.parametrize("size", [UNSIGNED_LIMIT_BYTES + 1, ENTRY_LIMIT_BYTES + 1, 8 << 20])


def make_large(size: int, head: str = '"name":"default","number":90000000') -> bytes:
    """JSON of many small parts, which takes the most time and memory."""
    body = f'{{{head},"x":['.encode() + b"[]," * (size // 3 + 1) + b"0]}"
    assert len(body) >= size
    return body


@SIZES
async def test_large_forged_announcement_is_refused_unparsed(
    registry: PolicyRegistry, shared: PolicyRedisCache, forgeries: Counter[str], parsed: list[bytes], size: int
) -> None:
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        await judging_policy(cache)
        await wait_for_listeners(shared, 1)
        await shared.client.publish(shared.key("changes"), make_large(size))
        await counted(forgeries, "announcement")
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()
        await PolicyService(registry, shared).activate("default", registry.publish(LENIENT).version, who="ann")
        await becomes(2, lambda: _version(cache))
    assert max(map(len, parsed)) <= UNSIGNED_LIMIT_BYTES


@pytest.mark.parametrize("protocol", [2, 3])
async def test_huge_announcement_is_not_read_and_the_next_one_is(
    registry: PolicyRegistry, valkey_url: str, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    """A script makes the announcement. Redis then sends it whole, with any `proto-max-bulk-len`."""
    registry.publish(STRICT)
    registry.activate("default", 1, who="ann")
    largest, read_exactly = 0, asyncio.StreamReader.readexactly

    async def note(reader: asyncio.StreamReader, size: int) -> bytes:
        nonlocal largest
        largest = max(largest, size)
        return await read_exactly(reader, size)

    monkeypatch.setattr(asyncio.StreamReader, "readexactly", note)
    shared = PolicyRedisCache(f"{valkey_url}?protocol={protocol}", registry.bucket, signing_key=SIGNING_KEY)
    await shared.client.config_set("proto-max-bulk-len", "2mb")
    try:
        async with PolicyCache(registry, shared, refresh_s=600) as cache:
            await judging_policy(cache)
            await wait_for_listeners(shared, 1)
            await run_on_server(shared.client, "redis.call('PUBLISH', KEYS[1], huge)", shared.key("changes"))
            await wait_for_listeners(shared, 0)
            await wait_for_listeners(shared, 1)
            await PolicyService(registry, shared).activate("default", registry.publish(LENIENT).version, who="ann")
            await becomes(2, lambda: _version(cache))
    finally:
        await shared.client.config_set("proto-max-bulk-len", "512mb")
        await shared.close()
    assert largest < ENTRY_LIMIT_BYTES


@SIZES
@pytest.mark.parametrize("field", ["change", "signature", "signed_ms"])
async def test_large_forged_rollout_is_refused_unparsed(
    registry: PolicyRegistry,
    shared: PolicyRedisCache,
    forgeries: Counter[str],
    parsed: list[bytes],
    size: int,
    field: str,
) -> None:
    forged = {"change": b'{"name":"default","number":90000000}'} | {field: make_large(size)}
    await shared.client.hset(shared.key("rollout", "default"), mapping=forged)
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()
    assert forgeries["rollout"] == 1
    assert max(map(len, parsed)) <= UNSIGNED_LIMIT_BYTES
    assert await shared.client.hstrlen(shared.key("rollout", "default"), field) < UNSIGNED_LIMIT_BYTES, "overwritten"


@SIZES
@pytest.mark.parametrize("reference", ["default", "default@1"])
async def test_large_forged_version_is_refused_unparsed(
    registry: PolicyRegistry,
    shared: PolicyRedisCache,
    forgeries: Counter[str],
    parsed: list[bytes],
    size: int,
    reference: str,
) -> None:
    name = shared.key("version", "default@1")
    await shared.client.set(name, make_large(size, f'"digest":"{STRICT.digest()}"'))
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        assert (await judging_policy(cache, reference)).identity.digest == STRICT.digest()
    assert forgeries == {"version": 1}
    assert max(map(len, parsed)) <= UNSIGNED_LIMIT_BYTES
    assert await shared.client.strlen(name) < UNSIGNED_LIMIT_BYTES, "overwritten"


async def test_lookup_that_waits_for_a_forged_lease_parses_one_forged_version(
    registry: PolicyRegistry, shared: PolicyRedisCache, forgeries: Counter[str], parsed: list[bytes]
) -> None:
    """While it waits, a lookup reads the entry again and again."""
    forged = make_large(1000, f'"digest":"{STRICT.digest()}"')
    await shared.client.set(shared.key("version", "default@1"), forged)
    await shared.client.set(shared.key("lease", "default@1"), "mallory", px=500)
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        assert (await judging_policy(cache)).identity.digest == STRICT.digest()
    assert 1 <= parsed.count(forged) <= 2, "once in the lookup, and once to compare it with the bucket"
    assert forgeries == {"version": 1}


@pytest.mark.parametrize("size", [UNSIGNED_LIMIT_BYTES, ENTRY_LIMIT_BYTES])
async def test_large_rollout_of_an_author_without_the_key_is_no_forgery(
    registry: PolicyRegistry, shared: PolicyRedisCache, valkey_url: str, forgeries: Counter[str], size: int
) -> None:
    """The canary has so many tenants that the change is not parsed, or not even stored. Their order is any."""
    registry.publish(LENIENT)
    author = PolicyRedisCache(valkey_url, registry.bucket)
    async with PolicyCache(registry, shared, refresh_s=0.5 if size == ENTRY_LIMIT_BYTES else 600) as cache:
        await judging_policy(cache)
        await wait_for_listeners(shared, 1)
        tenants = frozenset(f"{number:0200}" for number in range(size // 200))
        change = registry.set_canary("default", Canary(version=2, percent=0, tenants=tenants), who="ann")
        await author.publish_change("default", change)

        async def version_of_canary() -> int:
            return (await cache.choose(Submission(id="a", uri="s3://a/b", tenant=f"{7:0200}"))).policy.identity.version

        await becomes(2, version_of_canary)
    assert not forgeries
    await author.close()


async def test_large_signed_version_is_used_while_the_bucket_is_down(
    registry: PolicyRegistry, valkey_url: str, forgeries: Counter[str]
) -> None:
    rules = [f"{number:0999}" for number in range(40)]
    large = PolicyDocument.model_validate(
        {"name": "default", "categories": {code: {"should_not": rules} for code in ("O1", "O2", "O3")}}
    )
    stored = registry.publish(large)
    assert len(stored.to_json()) > UNSIGNED_LIMIT_BYTES
    shared = PolicyRedisCache(valkey_url, registry.bucket, signing_key=SIGNING_KEY)
    registry.activate("default", stored.version, who="ann")
    async with PolicyCache(registry, shared, refresh_s=600) as cache:
        await judging_policy(cache)
    async with PolicyCache(unreachable(), shared, refresh_s=600) as cache:
        assert (await judging_policy(cache)).identity.digest == large.digest()
    assert not forgeries
    await shared.close()
