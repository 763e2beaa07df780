"""The sample of recent submissions: its size, its content, and its weights by age."""

import uuid
from collections.abc import AsyncIterator

import pytest

from services.core.messages import Timings, Verdict
from services.core.values import PolicyIdentity
from services.policies import traffic_sample as sample_module
from services.policies.redis_cache import PolicyRedisCache
from services.policies.traffic_sample import TrafficSample, draw_sample
from tests.support.redis_attacks import little_is_sent, run_on_server


@pytest.fixture
async def shared(valkey_url: str) -> AsyncIterator[PolicyRedisCache]:
    copies = PolicyRedisCache(valkey_url, uuid.uuid4().hex)
    yield copies
    await copies.close()


def verdict(number: int) -> Verdict:
    return Verdict(
        verdict_id=str(number),
        submission_id=f"upl-{number}",
        uri=f"s3://uploads/{number}",
        version_id="v1",
        etag="e",
        sha256="0",
        tenant="acme",
        outcome="verdict",
        rating="Safe",
        category=None,
        rationale="seen by nobody",
        score=0.1,
        action="allow",
        policy=PolicyIdentity(name="default", version=1, digest="sha256:0"),
        model=None,
        effort="full",
        image=None,
        timings_ms=Timings(),
        metadata={"user": "u1"},
        submitted_at="2026-11-21T10:00:00Z",  # type: ignore[arg-type]
        judged_at="2026-11-21T10:00:01Z",  # type: ignore[arg-type]
    )


async def test_sample_is_bounded_and_holds_only_references(shared: PolicyRedisCache) -> None:
    sample = TrafficSample(shared, size=50)
    for number in range(1000):
        sample.add(verdict(number))
        if number % 100 == 99:
            await sample.flush()
    found, per_day = await draw_sample(shared, "default", 500)
    assert len({one.id for one in found}) == 50
    assert per_day is None, "not known before an hour has passed"
    one = found[0].to_submission()
    assert (one.version_id, one.etag, one.tenant, one.priority) == ("v1", "e", "acme", "backfill")
    raw = await shared.client.zrange(shared.key("sample", "default"), 0, -1)
    assert not any(b"seen by nobody" in entry or b"u1" in entry for entry in raw)
    assert (await draw_sample(shared, "other", 10)) == ([], None)


async def test_old_submissions_are_less_likely_in_the_sample(
    shared: PolicyRedisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(sample_module.time, "time", lambda: now)
    sample = TrafficSample(shared, size=400)
    for number in range(2000):
        sample.add(verdict(number))
        if number % 250 == 249:
            await sample.flush()
    found, _ = await draw_sample(shared, "default", 400)
    early = sum(int(one.id.removeprefix("upl-")) < 1000 for one in found)
    assert 140 < early < 260, "half of 400, within six standard deviations"
    now += 7 * 86_400
    for number in range(2000, 2400):
        sample.add(verdict(number))
    await sample.flush()
    found, _ = await draw_sample(shared, "default", 400)
    assert sum(int(one.id.removeprefix("upl-")) >= 2000 for one in found) > 380


async def test_huge_entries_are_not_drawn(shared: PolicyRedisCache) -> None:
    sample = TrafficSample(shared, size=50)
    for number in range(10):
        sample.add(verdict(number))
    await sample.flush()
    entries, hours = shared.key("sample", "default"), shared.key("seen", "default")
    await run_on_server(shared.client, "redis.call('ZADD', KEYS[1], 9e9, huge, 9e9, 'no JSON')", entries)
    fields = "for n = 1, 20000 do redis.call('HSET', KEYS[1], n, n) end redis.call('HSET', KEYS[1], huge, huge)"
    await run_on_server(shared.client, fields, hours)
    async with little_is_sent(shared.client):
        found, per_day = await draw_sample(shared, "default", 500)
    assert {one.id for one in found} == {f"upl-{number}" for number in range(10)}
    assert per_day is None, "the invented hours do not count"


async def test_sum_of_large_entries_is_bounded(shared: PolicyRedisCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "_SAMPLE_LIMIT_BYTES", 300_000)
    fill = "for n = 1, 100 do redis.call('ZADD', KEYS[1], n, string.sub(huge, 1, 60000) .. n) end"
    await run_on_server(shared.client, fill, shared.key("sample", "default"))
    async with little_is_sent(shared.client):
        assert (await draw_sample(shared, "default", 2000)) == ([], None)


@pytest.mark.parametrize("field", ["garbage", "4999999999"])
@pytest.mark.parametrize("count", ["garbage", "-7", "1e400", "9" * 30])
async def test_invented_hours_stop_neither_sampling_nor_backtests(
    shared: PolicyRedisCache, field: str, count: str
) -> None:
    hour = (await shared.client.time())[0] // 3600
    counts = {field: count, str(hour - 1): count, str(hour - 2): "100"}
    await shared.client.hset(shared.key("seen", "default"), mapping=counts)  # type: ignore[misc]
    sample = TrafficSample(shared, size=50)
    sample.add(verdict(1))
    await sample.flush()
    found, per_day = await draw_sample(shared, "default", 500)
    assert [one.id for one in found] == ["upl-1"]
    assert per_day is not None
    assert 0 < per_day < 101 * 24
