"""Admission: the order of the gateway's limits, and when memory is released."""

import pytest

from services.core.settings import Settings
from services.core.tenancy import NOT_SEPARATED
from services.gateway.admission import Admission
from services.gateway.api_keys import ApiKey, Role
from services.gateway.body_memory import BodyMemory
from services.gateway.load_shedding import BoundedModerator
from services.gateway.problems import HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.gateway.submitted_images import RequestContext, from_s3
from services.policies.redis_cache import PolicyRedisCache

MEMORY_BYTES = 400


def key(role: Role = "review", **limits: float) -> ApiKey:
    fields = {"id": "0" * 16, "name": "n", "role": role, "digest": "", "created_at": "2026-01-01T00:00:00Z"}
    return ApiKey.model_validate(fields | limits)


@pytest.fixture
def admission() -> Admission:
    """Limits without Redis: the process counts rates itself, with a stopped clock."""
    settings = Settings(gateway_rate_per_s=1, gateway_concurrency=1, gateway_in_flight=1)
    limiter = RateLimiter(PolicyRedisCache("redis://127.0.0.1:1/0", "admission"), settings, clock=lambda: 0.0)
    return Admission(limiter, BodyMemory(MEMORY_BYTES), BoundedModerator(None, settings), NOT_SEPARATED)  # type: ignore[arg-type]


async def kind_of_refusal(admission: Admission, key: ApiKey, role: Role = "moderate") -> str:
    with pytest.raises(HttpProblem) as refused:
        async with admission.admit(key, role):
            pass
    return refused.value.kind


async def test_admit_over_several_limits_reports_the_first_limit(admission: Admission) -> None:
    async with admission.admit(key(), "moderate"):
        assert await kind_of_refusal(admission, key()) == "too-many-at-once"
        assert await kind_of_refusal(admission, key(), "admin") == "not-permitted", "the role comes before the slot"
        assert await kind_of_refusal(admission, key(), "admin") == "rate-limited", "the rate comes before the role"


async def test_failed_request_releases_its_slot_and_memory(admission: Admission) -> None:
    async def exceed_memory() -> None:
        async with admission.admit(key(rate_per_s=1000), "moderate") as request:
            request.memory.reserve(MEMORY_BYTES // 4)
            request.memory.reserve(1)

    for _ in range(3):
        with pytest.raises(HttpProblem, match="memory"):
            await exceed_memory()
        assert admission.memory.used_bytes == 0


async def test_job_holds_its_memory_until_it_ends(admission: Admission) -> None:
    admitted_key = key(rate_per_s=1000)
    async with admission.admit(admitted_key, "moderate") as request:
        request.memory.reserve(100)
        job = request.start_job()
    assert admission.memory.used_bytes == 100
    async with admission.admit(admitted_key, "moderate") as second:
        with pytest.raises(HttpProblem, match="jobs at a time"):
            second.start_job()
    job.close()
    assert admission.memory.used_bytes == 0
    async with admission.admit(admitted_key, "moderate") as third:
        third.start_job().close()


async def test_judge_without_a_free_slot_at_the_guard_is_overloaded(admission: Admission) -> None:
    admission.moderator.in_flight = 1
    async with admission.admit(key(), "moderate") as request:
        image = from_s3("s3://uploads/a", RequestContext(request.api_key, "a"))
        with pytest.raises(HttpProblem) as refused:
            await request.judge(image)
    assert refused.value.kind == "overloaded"
    assert admission.moderator.in_flight == 1
