"""The state machine of assessments in Redis: abandoned assessments, late calls, and outages of Redis."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.core.settings import Settings
from services.core.tenancy import NOT_SEPARATED
from services.gateway.admission import Admission
from services.gateway.api_keys import ApiKey
from services.gateway.assessment_jobs import AssessmentJobs
from services.gateway.assessment_store import AssessmentStore, StoredAssessment
from services.gateway.body_memory import BodyMemory
from services.gateway.problems import TYPE_PREFIX, HttpProblem
from services.gateway.rate_limits import RateLimiter
from tests.support.gateway_bench import SwitchableRedisCache, age_assessment, ttl_of_assessment
from tests.support.verdicts import VERDICT

KEEP_S = 60
PROBLEM = HttpProblem("not-an-image", "the bytes are text")


@pytest.fixture
async def redis_cache(valkey_url: str) -> AsyncIterator[SwitchableRedisCache]:
    redis_cache = SwitchableRedisCache(valkey_url, uuid.uuid4().hex)
    yield redis_cache
    await redis_cache.close()


class NotingStore(AssessmentStore):
    """Notes each heartbeat."""

    def __init__(self, redis_cache: SwitchableRedisCache) -> None:
        super().__init__(redis_cache, redis_cache.signer, keep_s=KEEP_S, heartbeat_s=0.01)
        self.beat = asyncio.Event()

    async def send_heartbeat(self) -> None:
        await super().send_heartbeat()
        self.beat.set()


async def test_pending_assessment_is_renewed_by_each_heartbeat(redis_cache: SwitchableRedisCache) -> None:
    other = AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S)
    async with NotingStore(redis_cache) as store:
        pending = store.build_pending("shop")
        await store.create(pending)
        fresh_s = await ttl_of_assessment(redis_cache, pending.id)
        await age_assessment(redis_cache, pending.id, by_s=100)
        with store.renew(pending):
            for _ in range(2):  # the first heartbeat may have begun before
                store.beat.clear()
                async with asyncio.timeout(10):
                    await store.beat.wait()
        assert await ttl_of_assessment(redis_cache, pending.id) >= fresh_s - 1
        assert await other.get(pending.id) == pending


async def test_pending_assessment_without_renewal_is_interrupted(redis_cache: SwitchableRedisCache) -> None:
    async with AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S) as store:
        pending = store.build_pending("shop")
        await store.create(pending)
        assert await store.get(pending.id) == pending
        await age_assessment(redis_cache, pending.id, by_s=100)
        found = await store.get(pending.id)
    assert found is not None
    assert found.status == "failed"
    assert found.problem is not None
    assert found.problem["type"] == f"{TYPE_PREFIX}interrupted"


async def test_result_that_redis_missed_is_saved_when_the_store_closes(redis_cache: SwitchableRedisCache) -> None:
    other = AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S)
    async with AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S) as store:
        pending = store.build_pending("shop")
        await store.create(pending)
        redis_cache.is_down = True
        await store.finish(pending.with_problem(PROBLEM))
        redis_cache.is_down = False
        assert await other.get(pending.id) == pending
    assert await other.get(pending.id) == pending.with_problem(PROBLEM)


async def test_create_after_finish_does_not_change_the_result(redis_cache: SwitchableRedisCache) -> None:
    async with AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S) as store:
        pending = store.build_pending("shop")
        with store.renew(pending):
            await store.finish(pending.with_problem(PROBLEM))
            await store.create(pending)
            await store.send_heartbeat()
        assert await store.get(pending.id) == pending.with_problem(PROBLEM)
        assert await ttl_of_assessment(redis_cache, pending.id) <= KEEP_S, "the time to live is that of a result"


@pytest.mark.parametrize("is_down", [False, True], ids=["redis is up", "redis is down"])
async def test_job_over_the_limit_fails_and_releases_its_memory(
    redis_cache: SwitchableRedisCache, is_down: bool
) -> None:
    limiter, memory = RateLimiter(redis_cache, Settings(gateway_concurrency=1)), BodyMemory(1000)
    admission = Admission(limiter, memory, moderator=None, tenancy=NOT_SEPARATED)  # type: ignore[arg-type]
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=KEEP_S)
    key = ApiKey(id="0" * 16, name="n", role="admin", tenant="shop", digest="", created_at="2026-01-01T00:00:00Z")
    jobs: Any = AssessmentJobs(store)
    pending = store.build_pending("shop")
    redis_cache.is_down = is_down
    async with admission.admit(key, "moderate") as admitted:
        admitted.memory.reserve(100)
        with limiter.concurrency_slot(key, "jobs"), pytest.raises(HttpProblem, match="jobs at a time"):
            await jobs.start(pending, None, admitted)
        assert memory.used_bytes == 0
    found = await store.get(pending.id)
    assert found is not None
    assert found.status == "failed", "other requests with the idempotency key do not wait for it"


async def test_failure_and_its_idempotency_key_are_kept_for_ten_minutes(redis_cache: SwitchableRedisCache) -> None:
    """Failures cost a client little, and must not fill Redis."""
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=86_400)

    async def claim(name: str) -> StoredAssessment:
        pending = store.build_pending("shop")
        assert (await store.claim(name, "digest", pending)).assessment_id == pending.id
        return pending

    async def ttl(name: str) -> int:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return int(await redis_cache.client.ttl(redis_cache.key("gateway", "idempotency", digest)))

    failed, judged, replaced = await claim("failed"), await claim("judged"), await claim("replaced")
    known = await store.claim("replaced", "digest", store.build_pending("shop"))
    again = store.build_pending("shop")
    assert await store.replace("replaced", known, again)
    await store.finish(failed.with_problem(PROBLEM))
    await store.finish(replaced.with_problem(PROBLEM))
    await store.finish(judged.with_verdict(VERDICT))
    assert 590 < await ttl_of_assessment(redis_cache, failed.id) <= 600
    assert 590 < await ttl("failed") <= 600
    assert await ttl_of_assessment(redis_cache, judged.id) > 86_000
    assert await ttl("judged") > 86_000
    assert await ttl("replaced") > 86_000, "the key belongs to another assessment by now"
    await store.finish(again.with_problem(PROBLEM))
    assert 590 < await ttl("replaced") <= 600
    assert not store._claims
