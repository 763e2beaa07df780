"""Processes of version 0.1.0 and of today on the same Redis, as during a rolling upgrade.

`redis-0.1.0.json` holds the keys that the classes of 0.1.0 wrote to a Valkey server, each with its type, its time to
live and its value (bytes as Latin-1), and the message that they published. Today's code must read them. It must also
write the same keys for the same calls, because processes of 0.1.0 read those.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError
from redis.asyncio import Redis

from pipelines.dead_letters.replay import replay_id, replay_message
from pipelines.dead_letters.replay_log import ReplayLog
from pipelines.dead_letters.stored import StoredDeadLetter
from pipelines.intake.crash_isolation import CrashIsolation
from services.core.calibration import IsotonicMap
from services.core.errors import NotOwned
from services.core.messages import (
    ATTEMPTS_HEADER,
    REPLAYED_FROM_HEADER,
    DeadLetter,
    Submission,
    Timings,
    Verdict,
)
from services.core.settings import Settings
from services.core.values import (
    Action,
    BlockRateBand,
    ImageFacts,
    ModelIdentity,
    Policy,
    PolicyIdentity,
    Thresholds,
)
from services.gateway.api_keys import ApiKey
from services.gateway.assessment_store import AssessmentStore, StoredAssessment
from services.gateway.problems import HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.policies import traffic_sample
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker, find_trip_reason
from services.policies.document import PolicyDocument
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, Rollout, RolloutChange, Shadow
from services.policies.traffic_sample import TrafficSample
from services.streams.base import Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer, open_publisher, open_reader
from tests.support.policies import SIGNING_KEY
from tests.support.streams_bench import Streams, collect, eventually, values

RECORDED: Final = json.loads((Path(__file__).parent / "redis-0.1.0.json").read_text())
KEYS: Final[dict[str, dict[str, Any]]] = RECORDED["keys"]
POLICIES: Final = "sluice:policies:policies"
BLOCK_RATE: Final = f"{POLICIES}:block-rate:shop@2:6"
GROUP: Final = 6
"""The group of the tenant `shop`. Processes of later versions must count the tenant in the same group."""
AT: Final = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
REQUEST: Final = "99" * 32
"""The digest of the request that came with the idempotency key `order-1`."""


def verdict(name: str) -> Verdict:
    return Verdict(
        verdict_id="0b4c3f0e-2f0e-5b57-9a53-2f1a3d5c7e90",
        submission_id=name,
        uri=f"s3://uploads/{name}.jpg",
        version_id="v1",
        etag="0cc175b9c0f1b6a831c399e269772661",
        sha256="ab" * 32,
        tenant="shop",
        outcome="verdict",
        rating="Unsafe",
        category="O2: Violence, Harm, or Cruelty",
        rationale="A knife.",
        score=0.97,
        action="block",
        policy=PolicyIdentity(name="shop", version=2, digest="sha256:" + "cd" * 32),
        model=ModelIdentity(name="tiny", revision="1f2e3d", engine="sglang 0.5.23", prompt="sha256:" + "ef" * 32),
        effort="full",
        image=ImageFacts(width=640, height=480, format="jpeg"),
        timings_ms=Timings(queued=3, fetch=12, prepare=9, guard=140, total=165),
        metadata={"user": "ü1"},
        submitted_at=AT,
        judged_at=AT + timedelta(seconds=1),
    )


DOCUMENT: Final = PolicyDocument.model_validate(
    {"name": "shop", "description": "sells things", "categories": {"O9": "waive"}, "thresholds": {"block": 0.9}}
)
VERSION: Final = StoredVersion("shop", 2, DOCUMENT.digest(), DOCUMENT)
CHANGE: Final = RolloutChange.model_validate(
    {
        "name": "shop",
        "number": 7,
        "action": "canary",
        "from": None,
        "to": 2,
        "who": "ann",
        "why": "too lenient",
        "at": AT,
        "rollout": Rollout(
            active=1,
            earlier=(3,),
            canary=Canary(version=2, percent=5, tenants=frozenset({"acme"})),
            shadow=Shadow(version=4, percent=10),
            tripped=frozenset({3}),
            since=6,
            digests={1: "sha256:" + "11" * 32, 2: DOCUMENT.digest(), 4: "sha256:" + "44" * 32},
            calibrations={1: {"1f2e3d": (IsotonicMap(scores=(0.1, 0.9), probabilities=(0.05, 0.8)),)}},
        ),
    }
)
POLICY: Final = Policy(
    identity=PolicyIdentity(name="shop", version=2, digest=DOCUMENT.digest()),
    prompt="p",
    thresholds=Thresholds(review=0.5, block=0.9),
    category_thresholds={},
    rationale="unsafe",
    effort="full",
    first_look_below=0.1,
    block_rate=BlockRateBand(at_least=0.0, at_most=0.5, window_s=600, after=1000),
)
SUBMISSION: Final = Submission(
    id="upl-2",
    uri="s3://uploads/upl-2.jpg",
    tenant="shop",
    policy="shop@2",
    submitted_at=AT,
    metadata={"user": "ü1"},
)
LETTER: Final = DeadLetter(
    submission_id="upl-2",
    reason="not_found",
    detail="s3://uploads/ä.jpg does not exist",
    attempts=2,
    source="sluice.submissions/2-0",
    failed_at=AT,
)
LETTER_HEADERS: Final = (*LETTER.headers(), ("ce_id", b"7"))
DEAD: Final = StoredDeadLetter(
    LETTER,
    Message(SUBMISSION.model_dump_json().encode(), b"k", LETTER_HEADERS, "sluice.dead-letters/5-0", AT),
    (),
)
KEY: Final = ApiKey(id="0123456789abcdef", name="ci", role="moderate", rate_per_s=5, digest="00" * 32, created_at=AT)


class FixedRollout:
    """A policy cache whose only rollout is that of `CHANGE`."""

    async def get_rollout(self, name: str) -> Rollout:
        assert name == "shop"
        return CHANGE.rollout

    def is_tripped(self, identity: PolicyIdentity) -> bool:
        return False


def stored(name: str, **fields: Any) -> StoredAssessment:
    return StoredAssessment(id=name, tenant="shop", process="gateway-0", **fields)


ASSESSMENTS: Final = {
    "asm_done": stored("asm_done", status="done", verdict=verdict("asm_done")),
    "asm_failed": stored(
        "asm_failed",
        status="failed",
        problem={
            "type": "urn:sluice:problem:image-not-found",
            "title": "There is no such object",
            "status": 422,
            "detail": "s3://uploads/a.jpg does not exist",
        },
    ),
    "asm_pending": stored("asm_pending", status="pending"),
    "asm_claimed": stored("asm_claimed", status="pending"),
}


@pytest.fixture
def url(valkey_url: str) -> str:
    """A database of its own on the shared server: the recorded keys have the default names."""
    return valkey_url.removesuffix("/0") + "/7"


@pytest.fixture
def settings(url: str) -> Settings:
    return Settings(stream_url=url, redis_url=url)


@pytest.fixture
async def client(url: str) -> AsyncIterator[Any]:
    async with Redis.from_url(url, protocol=2) as client:
        await client.flushdb()
        yield client
        await client.flushdb()


@pytest.fixture
async def redis_cache(url: str) -> AsyncIterator[PolicyRedisCache]:
    cache = PolicyRedisCache(url, "policies")
    yield cache
    await cache.close()


def encoded(value: Any) -> Any:
    return value.encode("latin-1") if isinstance(value, str) else value


def decoded(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


async def restore(client: Any, *names: str) -> None:
    """Write recorded keys."""
    for name in names:
        value = KEYS[name]["value"]
        match KEYS[name]["type"]:
            case "string":
                await client.set(name, encoded(value))
            case "hash":
                await client.hset(name, mapping={encoded(field): encoded(each) for field, each in value.items()})
            case "set":
                await client.sadd(name, *map(encoded, value))
            case "zset":
                await client.zadd(name, {encoded(member): score for member, score in value.items()})
            case "stream":
                for entry in value:
                    await client.xadd(name, {encoded(field): encoded(each) for field, each in entry.items()})
        if KEYS[name]["ttl"] > 0:
            await client.expire(name, KEYS[name]["ttl"])


async def dump(client: Any) -> dict[str, Any]:
    """All keys, in the form of the recording."""
    keys = {}
    for name in map(bytes.decode, await client.keys()):
        kind = (await client.type(name)).decode()
        match kind:
            case "string":
                value: Any = decoded(await client.get(name))
            case "hash":
                value = {decoded(field): decoded(each) for field, each in (await client.hgetall(name)).items()}
            case "set":
                value = sorted(map(decoded, await client.smembers(name)))
            case "zset":
                found = await client.zrange(name, 0, -1, withscores=True)
                value = {decoded(member): score for member, score in found}
            case _:
                found = await client.xrange(name)
                value = [{decoded(field): decoded(each) for field, each in entry.items()} for _, entry in found]
        keys[name] = {"type": kind, "ttl": await client.ttl(name), "value": value}
    return keys


def without_times(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys with a word in the place of each time, random number and token, and a rounded time to live."""
    return {name: _without_times(name, **entry) for name, entry in keys.items()}


def _without_times(name: str, type: str, ttl: int, value: Any) -> dict[str, Any]:  # noqa: A002 - the recording's name
    if name == "sluice:sluice:alive" or ":sample:" in name:
        assert all(isinstance(score, float) for score in value.values())
        value = dict.fromkeys(value, "a number")
    elif ":rollout:" in name:
        assert abs(int(value["checked_ms"]) / 1000) > 1e9
        value = value | {"checked_ms": "a time"}
    elif ":rate:" in name:
        assert re.fullmatch(r"\d{10}\.\d{6}", value)
        value = "a time"
    elif ":lease:" in name or name.endswith(":replaying"):
        assert re.fullmatch("[0-9a-f]{32}", value)
        value = "a token"
    elif ":seen:" in name or ":block-rate:" in name:
        assert all(re.match(r"\d+(:|$)", field) for field in value)
        value = {re.sub(r"^\d+", "time slice", field): each for field, each in value.items()}
    # A slow machine may be some seconds late; shorter lives are checked where they matter.
    return {"type": type, "ttl": ttl if ttl < 0 else "short" if ttl <= 20 else round(ttl, -2), "value": value}


async def write_crashes(client: Any, redis_cache: PolicyRedisCache) -> None:
    dead, alive = (CrashIsolation(redis_cache, "sluice", f"intake-{number}") for number in range(2))
    await dead.register(["sluice.submissions/1-0"])
    await client.zadd("sluice:sluice:alive", {"intake-0": time.time() - 60})
    assert await alive.register(["sluice.submissions/1-0", "sluice.submissions/2-0"]) == [1, 0]


async def write_policies(redis_cache: PolicyRedisCache) -> None:
    await redis_cache.cache_version(VERSION)
    await redis_cache.publish_change("shop", CHANGE)
    await redis_cache.publish_change("absent", None)
    assert await redis_cache.lease("shop")
    sample = TrafficSample(redis_cache, size=10)
    sample.add(verdict("upl-1"))
    await sample.flush()


async def count_actions(client: Any, redis_cache: PolicyRedisCache, *actions: Action, tenant: str = "shop") -> None:
    """Count verdicts with these actions, and wait until Redis has them."""
    policies, registry = cast("PolicyCache", FixedRollout()), cast("PolicyRegistry", None)
    before = await client.hgetall(BLOCK_RATE)
    async with CircuitBreaker(policies, registry, redis_cache) as breaker:
        for action in actions:
            assert breaker.count_and_allow(POLICY, action, tenant)

        async def counted() -> bool:
            return bool(await client.hgetall(BLOCK_RATE) != before)

        await eventually(counted)


async def write_assessments(redis_cache: PolicyRedisCache) -> None:
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=86_400)
    store.process = "gateway-0"
    async with store:
        await store.create(ASSESSMENTS["asm_pending"])
        await store.claim("order-1", REQUEST, ASSESSMENTS["asm_claimed"])
        await store.finish(ASSESSMENTS["asm_done"])
        await store.finish(ASSESSMENTS["asm_failed"])


async def write_streams(settings: Settings) -> None:
    publisher = await open_publisher(StreamConfig.from_settings(settings))
    value = SUBMISSION.model_dump_json().encode()
    await publisher.publish(
        [
            OutgoingMessage(settings.submissions_stream, value, SUBMISSION.uri.encode()),
            OutgoingMessage(
                settings.verdicts_stream, verdict("upl-1").model_dump_json().encode(), b"s3://uploads/upl-1.jpg"
            ),
            OutgoingMessage(settings.dead_letters_stream, value, b"k", LETTER_HEADERS),
            replay_message(DEAD, settings),
            OutgoingMessage(settings.backfill_stream, b"\xff", None, ()),
        ]
    )
    await publisher.close()


async def test_same_calls_write_the_keys_of_0_1_0(
    client: Any, redis_cache: PolicyRedisCache, settings: Settings
) -> None:
    await write_crashes(client, redis_cache)
    await write_policies(redis_cache)
    await count_actions(client, redis_cache, "block", "allow", "review")
    await write_assessments(redis_cache)
    await RateLimiter(redis_cache, settings).acquire(KEY)
    await write_streams(settings)
    async with ReplayLog(settings, lease=True, progress=print) as replay_log:
        await replay_log.add([replay_id(DEAD)])
        written = await dump(client)
    # Block rates are now counted by group of tenants. Tests below show that processes of 0.1.0 add the groups up.
    counted = KEYS[BLOCK_RATE] | {"value": {f"{name}:{GROUP}": n for name, n in KEYS[BLOCK_RATE]["value"].items()}}
    # A store removes its sign of life when it is closed; a running one is in a test of its own.
    expected = {name: entry for name, entry in KEYS.items() if ":gateway:alive:" not in name} | {BLOCK_RATE: counted}
    # A failed assessment lives for ten minutes now. Processes of 0.1.0 read it until then, and afterwards answer 404.
    failed = f"{POLICIES}:gateway:assessment:asm_failed"
    expected[failed] = expected[failed] | {"ttl": 600}
    # These live for seconds, so a slow machine may have lost them: they have tests of their own, too.
    lost = {name for name in expected if 0 < expected[name]["ttl"] <= 5} - written.keys()
    assert without_times(written) == without_times({n: entry for n, entry in expected.items() if n not in lost})


async def test_running_gateway_writes_the_heartbeat_of_0_1_0(client: Any, redis_cache: PolicyRedisCache) -> None:
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=86_400)
    store.process = "gateway-0"
    async with store:
        written = await dump(client)
    name = f"{POLICIES}:gateway:alive:gateway-0"
    assert (written.keys(), written[name]["value"]) == ({name}, KEYS[name]["value"])
    assert 0 < written[name]["ttl"] <= KEYS[name]["ttl"]


async def test_crashes_of_processes_of_0_1_0_are_counted(client: Any, redis_cache: PolicyRedisCache) -> None:
    await restore(
        client,
        "sluice:sluice:alive",
        "sluice:sluice:in-hand:intake-1",
        "sluice:sluice:crashes:sluice.submissions/1-0",
    )  # the heartbeat in the recording is old: intake-1 has crashed
    sources = [f"sluice.submissions/{number}-0" for number in (1, 2, 3)]
    assert await CrashIsolation(redis_cache, "sluice", "intake-2").register(sources) == [1, 1, 0]


async def test_running_process_of_0_1_0_is_not_counted_as_crashed(client: Any, redis_cache: PolicyRedisCache) -> None:
    await restore(client, "sluice:sluice:in-hand:intake-1")
    await client.zadd("sluice:sluice:alive", {"intake-1": time.time()})
    isolation = CrashIsolation(redis_cache, "sluice", "intake-2")
    assert await isolation.register(["sluice.submissions/2-0"]) == [0]
    assert await client.smembers("sluice:sluice:in-hand:intake-1") == {b"sluice.submissions/2-0"}


async def test_policy_version_and_rollout_of_0_1_0_are_read(client: Any, redis_cache: PolicyRedisCache) -> None:
    await restore(client, *(f"{POLICIES}:{name}" for name in ("version:shop@2", "rollout:shop", "rollout:absent")))
    version = await redis_cache.find_version("shop", 2)
    assert version is not None
    assert version.stored == VERSION
    known, absent = await redis_cache.find_newest_change("shop"), await redis_cache.find_newest_change("absent")
    assert known is not None
    assert known.change == CHANGE
    assert absent is not None
    assert absent.change is None
    older = CHANGE.model_copy(update={"number": 6})
    await redis_cache.publish_change("shop", older)
    unchanged = await redis_cache.find_newest_change("shop")
    assert unchanged is not None
    assert unchanged.change == CHANGE


async def test_announcements_of_0_1_0_and_of_today_are_the_same(client: Any, redis_cache: PolicyRedisCache) -> None:
    channel, message = RECORDED["published"]

    async def publish_as_0_1_0() -> None:
        await client.publish(channel, encoded(message))

    async with asyncio.timeout(20):
        async for announced in redis_cache.subscribe(publish_as_0_1_0):
            assert announced is not None
            assert announced.change == CHANGE
            break
    async with client.pubsub(ignore_subscribe_messages=True) as listener:
        await listener.subscribe(channel)
        await listener.get_message(timeout=5)
        await redis_cache.publish_change("shop", CHANGE)
        async with asyncio.timeout(20):
            while (received := await listener.get_message(timeout=1)) is None:
                pass
    assert received["data"] == encoded(message)


async def test_lease_of_0_1_0_is_respected(client: Any, redis_cache: PolicyRedisCache) -> None:
    await client.set(f"{POLICIES}:lease:shop", KEYS[f"{POLICIES}:lease:shop"]["value"], px=60_000)
    assert await redis_cache.lease("shop") is None
    await redis_cache.release("shop", "another token")
    assert await redis_cache.lease("shop") is None
    await redis_cache.release("shop", KEYS[f"{POLICIES}:lease:shop"]["value"])
    assert await redis_cache.lease("shop")
    assert 0 < await client.pttl(f"{POLICIES}:lease:shop") <= 5_000


async def test_traffic_sample_of_0_1_0_is_drawn(client: Any, redis_cache: PolicyRedisCache) -> None:
    await restore(client, f"{POLICIES}:sample:shop", f"{POLICIES}:seen:shop")
    drawn, _ = await traffic_sample.draw_sample(redis_cache, "shop", 10)
    assert [(each.id, each.uri, each.version_id, each.tenant, each.at) for each in drawn] == [
        ("upl-1", "s3://uploads/upl-1.jpg", "v1", "shop", AT)
    ]


async def count_as_0_1_0(client: Any, judged: int, blocked: int) -> list[int]:
    """Count verdicts, and return those of the window, as a process of 0.1.0 does."""
    script = (Path(__file__).parent / "circuit-breaker-0.1.0.lua").read_text()
    return cast("list[int]", await client.eval(script, 1, BLOCK_RATE, 60.0, 10, judged, blocked))


async def test_process_of_0_1_0_adds_up_the_counts_of_today(client: Any, redis_cache: PolicyRedisCache) -> None:
    await count_actions(client, redis_cache, "block", "allow", "review")
    assert await count_as_0_1_0(client, 10, 4) == [10 + 3, 4 + 1]
    await count_actions(client, redis_cache, "block", tenant="another")
    assert await count_as_0_1_0(client, 0, 0) == [10 + 4, 4 + 2]


async def test_circuit_breaker_counts_the_verdicts_of_processes_of_0_1_0(
    client: Any, redis_cache: PolicyRedisCache
) -> None:
    assert await count_as_0_1_0(client, 10, 4) == [10, 4]
    breaker = CircuitBreaker(cast("PolicyCache", FixedRollout()), cast("PolicyRegistry", None), redis_cache)
    assert breaker.count_and_allow(POLICY, "block", "shop")
    counts = await breaker._count(breaker._unsent[POLICY.identity], CHANGE.rollout.since)
    assert counts == {"judged": 10, "blocked": 4, f"judged:{GROUP}": 1, f"blocked:{GROUP}": 1}
    assert find_trip_reason({"judged": 1000, "blocked": 600}, POLICY.block_rate or BlockRateBand()), "they open it, too"


async def test_old_slices_of_today_are_removed_by_0_1_0_and_the_reverse(
    client: Any, redis_cache: PolicyRedisCache
) -> None:
    old = int(time.time() // 60) - 20
    fields = {f"{old}:judged": 1, f"{old}:blocked": 1, f"{old}:judged:{GROUP}": 1, f"{old}:blocked:{GROUP}": 1}
    await client.hset(BLOCK_RATE, mapping=fields)
    assert await count_as_0_1_0(client, 2, 1) == [2, 1]
    assert await client.hmget(BLOCK_RATE, *fields) == [None] * 4
    await client.hset(BLOCK_RATE, mapping=fields)
    await count_actions(client, redis_cache, "allow")
    assert await client.hmget(BLOCK_RATE, *fields) == [None] * 4


async def test_assessments_of_0_1_0_are_found(client: Any, redis_cache: PolicyRedisCache) -> None:
    gateway = f"{POLICIES}:gateway"
    await restore(client, *(f"{gateway}:assessment:{name}" for name in ASSESSMENTS), f"{gateway}:alive:gateway-0")
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=86_400)
    assert {name: await store.get(name) for name in ASSESSMENTS} == ASSESSMENTS
    await client.delete(f"{gateway}:alive:gateway-0")
    interrupted = await store.get("asm_pending")
    assert interrupted is not None
    assert (interrupted.status, (interrupted.problem or {})["type"]) == ("failed", "urn:sluice:problem:interrupted")


async def test_signed_assessments_have_the_fields_that_0_1_0_reads(client: Any, url: str) -> None:
    """Version 0.1.0 ignores fields that it does not know."""
    signing = PolicyRedisCache(url, "policies", signing_key=SIGNING_KEY)
    await write_assessments(signing)
    names = [name for name in KEYS if ":gateway:assessment:" in name or ":gateway:idempotency:" in name]
    for name in names:
        document = json.loads(await client.get(name))
        assert len(document.pop("signature")) == 64
        assert document.pop("expires_s", 0) > time.time() or document["status"] == "pending"
        assert document == json.loads(encoded(KEYS[name]["value"]))
    assert len(names) == 5
    await signing.close()


async def test_idempotency_key_of_0_1_0_is_claimed_and_replaced(client: Any, redis_cache: PolicyRedisCache) -> None:
    (name,) = [name for name in KEYS if ":idempotency:" in name]
    await restore(client, name)
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=86_400)
    another = stored("asm_another", status="pending")
    claim = await store.claim("order-1", "00" * 32, another)
    assert (claim.request_digest, claim.assessment_id) == (REQUEST, "asm_claimed")
    # A replacement compares the whole value, so it fails if today's JSON differs in one byte.
    assert await store.replace("order-1", claim, another)


async def test_rate_of_0_1_0_counts(client: Any, redis_cache: PolicyRedisCache, settings: Settings) -> None:
    name = f"{POLICIES}:gateway:rate:{KEY.id}"
    await client.set(name, f"{time.time() + 100:.6f}", ex=60)
    with pytest.raises(HttpProblem, match="5 images a second"):
        await RateLimiter(redis_cache, settings).acquire(KEY)


async def test_replays_of_0_1_0_are_known(client: Any, settings: Settings) -> None:
    await restore(client, "sluice:sluice.dead-letters:replayed")
    async with ReplayLog(settings, lease=False, progress=print) as replay_log:
        assert await replay_log.contains([replay_id(DEAD), b"another"]) == {replay_id(DEAD)}


async def test_replay_waits_for_one_of_0_1_0(client: Any, settings: Settings) -> None:
    name = "sluice:sluice.dead-letters:replaying"
    await client.set(name, KEYS[name]["value"], px=1_000)
    said: list[str] = []
    async with ReplayLog(settings, lease=True, progress=said.append):
        assert await client.get(name) != encoded(KEYS[name]["value"])
        assert 0 < await client.pttl(name) <= 20_000
    assert [line for line in said if "another replay is running" in line]


async def test_messages_of_0_1_0_are_read(client: Any, settings: Settings) -> None:
    streams = [name for name, entry in KEYS.items() if entry["type"] == "stream"]
    await restore(client, *streams)
    reader = await open_reader(StreamConfig.from_settings(settings))
    read = {stream: [message async for message in reader.read(stream, follow=False)] for stream in streams}
    await reader.close()

    fresh, replayed = read[settings.submissions_stream]
    assert (Submission.parse(json.loads(fresh.value)), fresh.key, fresh.headers) == (
        SUBMISSION,
        SUBMISSION.uri.encode(),
        (),
    )
    assert (replayed.value, replayed.key, replayed.header("ce_id")) == (DEAD.message.value, b"k", b"7")
    assert (replayed.header(REPLAYED_FROM_HEADER), replayed.header(ATTEMPTS_HEADER)) == (
        b"sluice.dead-letters/5-0",
        b"2",
    )
    (judged,) = read[settings.verdicts_stream]
    assert Verdict.model_validate_json(judged.value) == verdict("upl-1")
    (dead,) = read[settings.dead_letters_stream]
    assert DeadLetter.from_headers(dead.headers) == LETTER
    (other,) = read[settings.backfill_stream]
    assert (other.value, other.key, other.headers) == (b"\xff", None, ())


async def test_entry_pending_for_a_member_of_0_1_0_is_taken_over(client: Any, settings: Settings) -> None:
    await client.xgroup_create("sluice.submissions", "sluice", id="0", mkstream=True)
    await restore(client, "sluice.submissions")
    # A member's name and the group's, as 0.1.0 has them.
    await client.xreadgroup("sluice", "intake-0-0123abcd", {"sluice.submissions": ">"}, count=1)
    config = StreamConfig.from_settings(settings.model_copy(update={"redis_claim_idle_s": 0.5}))
    member = await open_consumer(config, "intake-1")
    received = await collect(member, 2)
    assert sorted(message.attempts for message in received) == [1, 2]
    for message in received:
        await member.settle(message, [])
    await member.close()
    (group,) = await client.xinfo_groups("sluice.submissions")
    assert (group["name"], group["pending"]) == (b"sluice", 0)


async def test_entry_taken_over_from_a_member_of_today_is_not_settled_twice(client: Any, settings: Settings) -> None:
    await restore(client, "sluice.submissions")
    member = await open_consumer(StreamConfig.from_settings(settings), "intake-0")
    first, *_ = await collect(member, 2)
    # As XAUTOCLAIM of a member of 0.1.0 does after an outage of this one.
    await client.xclaim("sluice.submissions", "sluice", "intake-1-0123abcd", 0, [first.source.rpartition("/")[2]])
    with pytest.raises(NotOwned):
        await member.settle(first, [OutgoingMessage(settings.verdicts_stream, b"{}", None)])
    await member.close()
    assert await client.xlen(settings.verdicts_stream) == 0


@pytest.mark.kafka
async def test_member_takes_the_transactional_id_of_its_predecessor_of_0_1_0(kafka_address: str) -> None:
    """A member with SLUICE_MEMBER_ID replaces a process of 0.1.0, which may have left a transaction open."""
    streams = Streams("kafka", f"kafka://{kafka_address}")
    settings = streams.settings(delivery="exactly_once", member_id="member-7")
    await streams.submit("a")

    def begin() -> KafkaProducer:
        producer = KafkaProducer(
            bootstrap_servers=kafka_address, transactional_id=f"{settings.group}/member-7", acks="all"
        )
        producer.init_transactions()
        producer.begin_transaction()
        producer.send(settings.verdicts_stream, b"of 0.1.0")
        producer.flush()
        return producer

    predecessor = await asyncio.to_thread(begin)
    member = await streams.member(delivery="exactly_once", member_id="member-7")
    (message,) = await collect(member, 1)
    await member.settle(message, [streams.verdict("of today")])
    with pytest.raises(KafkaError):
        await asyncio.to_thread(predecessor.commit_transaction)
    await asyncio.to_thread(predecessor.close, 1)
    assert await streams.verdicts() == ["of today"]
    await streams.close()


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_committed_offset_on_kafka_has_no_metadata(kafka_address: str, delivery: str) -> None:
    streams = Streams("kafka", f"kafka://{kafka_address}")
    settings = streams.settings(delivery=delivery)
    await streams.submit("a", "b")
    member = await streams.member(delivery=delivery)
    for message in await collect(member, 2):
        await member.settle(message, [streams.verdict(message.value.decode())])
    await member.close()

    def committed() -> list[tuple[int, str]]:
        admin = KafkaAdminClient(bootstrap_servers=kafka_address)
        try:
            offsets = admin.list_group_offsets({settings.group: None})[settings.group]
        finally:
            admin.close()
        return [(each.offset, each.metadata) for each in offsets.values() if each.offset > 0]

    found = await asyncio.to_thread(committed)
    assert sum(offset for offset, _ in found) >= 2
    assert {metadata for _, metadata in found} == {""}
    await streams.submit("c")
    after = await streams.member("after", delivery=delivery)
    assert values(await collect(after, 1)) == ["c"]
    await streams.close()
