"""Crash isolation: poison messages become dead letters, messages beside them do not."""

import asyncio
import json
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from pipelines.intake import crash_isolation, crash_registry
from pipelines.intake.crash_isolation import MAX_CRASHES, CrashIsolation
from services.core.errors import RedisUnavailable
from services.core.messages import DeadLetter, Verdict
from services.core.processes import SupervisedProcess
from services.core.redis import RedisClient
from services.streams.base import OutgoingMessage
from tests.support.streams_bench import Streams, eventually, reach


@pytest.mark.parametrize(
    ("kind", "poison"), [("redis", "deadly-to-read"), pytest.param("kafka", "deadly-to-judge", marks=pytest.mark.kafka)]
)
async def test_poison_message_after_three_crashes_is_a_dead_letter(
    kind: str, poison: str, valkey_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = valkey_url if kind == "redis" else f"kafka://{request.getfixturevalue('kafka_address')}"
    streams = Streams(kind, url)
    settings = streams.settings(
        redis_url=valkey_url, redis_claim_idle_s=6.0, session_timeout_ms=6_000, in_flight=32, backfill_stream=""
    )
    ids = [f"upload-{number}" for number in range(60)]
    ids[20] = poison
    values = [json.dumps({"id": each, "uri": f"s3://uploads/{number % 7}"}).encode() for number, each in enumerate(ids)]
    await streams.publish(*(OutgoingMessage(settings.submissions_stream, each, each[-3:]) for each in values))
    crashes = 0
    member: SupervisedProcess | None = None

    async def outcomes() -> Counter[str]:
        letters = await streams.everything(settings.dead_letters_stream)
        verdicts = await streams.everything(settings.verdicts_stream)
        judged = {Verdict.model_validate_json(each.value).submission_id for each in verdicts}
        return Counter([*judged, *(json.loads(each.value)["id"] for each in letters)])

    async def settled() -> int:
        """Outcomes and crashes. It starts the member again after a crash."""
        nonlocal crashes, member
        if member is None or member.returncode is not None:
            crashes += member is not None
            name = f"member-{crashes}"
            argv = [sys.executable, "-m", "tests.support.poisoned_member", settings.model_dump_json(), name]
            member = SupervisedProcess(argv, log=tmp_path / f"{name}.log")
        return len(await outcomes()) + crashes

    async def without_outcome() -> str:
        return f"without an outcome: {set(ids) - set(await outcomes())}"

    try:
        await reach(len(ids) + MAX_CRASHES, settled, describe=without_outcome)
        assert member is not None
        assert member.returncode is None
    finally:
        if member is not None:
            member.stop(grace_s=10)
    assert crashes == MAX_CRASHES
    assert await outcomes() == Counter(ids)
    (dead,) = await streams.everything(settings.dead_letters_stream)
    letter = DeadLetter.from_headers(dead.headers)
    assert (json.loads(dead.value)["id"], letter.reason, letter.attempts) == (poison, "guard_failed", MAX_CRASHES + 1)
    assert "crash" in letter.detail


async def test_message_with_two_crashes_runs_alone(valkey_url: str) -> None:
    redis = RedisClient(valkey_url, "sluice:")
    async with CrashIsolation(redis, uuid.uuid4().hex, "member") as isolation:
        release = asyncio.Event()
        running: set[str] = set()
        beside: dict[str, set[str]] = {}

        async def process(source: str, crashes: int) -> None:
            async with isolation.isolate(source, crashes):
                running.add(source)
                await (release.wait() if crashes < MAX_CRASHES - 1 else asyncio.sleep(0))
                beside[source] = set(running)
                running.remove(source)

        unsuspected = [asyncio.create_task(process(f"unsuspected-{number}", 0)) for number in range(12)]
        suspected = [asyncio.create_task(process(f"suspected-{number}", 1)) for number in range(12)]

        async def all_that_may_run_do() -> bool:
            return len(running) >= 12 + 8

        await eventually(all_that_may_run_do)
        isolated = [asyncio.create_task(process(name, MAX_CRASHES - 1)) for name in ("isolated", "another")]
        release.set()
        await asyncio.gather(*unsuspected, *suspected, *isolated)
    assert beside["isolated"] == {"isolated"}
    assert beside["another"] == {"another"}
    assert max(map(len, beside.values())) > 12, "unsuspected messages run at the same time"
    assert max(sum(each.startswith("suspected") for each in group) for group in beside.values()) == 8
    await redis.close()


async def test_orderly_shutdown_is_not_counted_as_a_crash(valkey_url: str) -> None:
    redis = RedisClient(valkey_url, "sluice:")
    async with CrashIsolation(redis, "orderly", "first") as first:
        assert await first.register(["a", "b"]) == [0, 0]
        first.release("a")
    async with CrashIsolation(redis, "orderly", "second") as second:
        assert await second.register(["a", "b"]) == [0, 0]
    await redis.close()


async def test_crash_counts_only_messages_in_flight(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_registry, "_DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(crash_registry, "_HEARTBEAT_INTERVAL_S", 0.05)
    redis, group = RedisClient(valkey_url, "sluice:"), uuid.uuid4().hex
    first = CrashIsolation(redis, group, "first")  # never entered, so it sends no heartbeat
    assert await first.register(["done", "in flight"]) == [0, 0]
    first.release("done")
    await first.register(["also in flight"])
    async with CrashIsolation(redis, group, "second") as second:

        async def counted() -> bool:
            return await second.register(["in flight"]) == [1]

        await eventually(counted)
        assert await second.register(["done", "also in flight"]) == [0, 1]
    await redis.close()


async def test_slow_process_with_heartbeat_is_not_counted_as_crashed(valkey_url: str) -> None:
    """Redis or this process may have been paused for longer than `_DEAD_AFTER_S`."""
    redis, group = RedisClient(valkey_url, "sluice:"), uuid.uuid4().hex
    isolation = CrashIsolation(redis, group, "member")
    await isolation.register(["in flight"])
    await redis.client.sadd(f"sluice:{group}:in-hand:dead", "in flight of the dead")
    await redis.client.zadd(f"sluice:{group}:alive", {"member": 1, "dead": 1})
    await isolation.registry.update()
    assert await CrashIsolation(redis, group, "new").register(["in flight", "in flight of the dead"]) == [0, 1]
    await redis.close()


@pytest.mark.parametrize("crashes", [1, MAX_CRASHES - 1])
async def test_waiting_suspect_does_not_hold_up_other_messages(
    valkey_url: str, crashes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An isolated message that waits forever would otherwise stop the process; so would nine suspected ones."""
    monkeypatch.setattr(crash_isolation, "_ISOLATION_S", 0.2)
    redis = RedisClient(valkey_url, "sluice:")
    isolation = CrashIsolation(redis, uuid.uuid4().hex, "member")
    for_ever, began = asyncio.Event(), asyncio.Semaphore(0)

    async def touch(source: str, crashes: int, *, wait: bool) -> None:
        async with isolation.isolate(source, crashes):
            began.release()
            if wait:
                await for_ever.wait()

    waiting = [asyncio.create_task(touch(f"waits-{number}", crashes, wait=True)) for number in range(9)]
    waiting += [asyncio.create_task(touch("is stuck", 0, wait=True))]
    async with asyncio.timeout(30):
        for _ in waiting:
            await began.acquire()
        for other in range(MAX_CRASHES):
            await touch("other", other, wait=False)
    assert isolation.registry.in_flight.isdisjoint(f"waits-{number}" for number in range(9)) == (crashes > 1)
    for_ever.set()
    await asyncio.gather(*waiting)
    assert (isolation._running, isolation._exclusive_source, isolation.registry.in_flight) == (0, None, set())
    await redis.close()


async def test_redis_outage_is_probed_only_by_the_heartbeat(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to a hanging server takes seconds."""
    redis = RedisClient(valkey_url, "sluice:")
    calls: list[str] = []
    answer = redis.run

    async def hang(*_: object) -> None:
        calls.append("no answer")
        raise RedisUnavailable("no answer")

    isolation = CrashIsolation(redis, "away", "member")
    monkeypatch.setattr(redis, "run", hang)
    assert await isolation.register(["a"]) == [0]
    assert await isolation.register(["b"]) == [0]
    async with isolation.isolate("c", 1):
        pass
    assert calls == ["no answer"]
    monkeypatch.setattr(redis, "run", answer)
    async with isolation:  # its heartbeat registers the messages of the outage

        async def are_registered() -> bool:
            return await redis.client.smembers("sluice:away:in-hand:member") == {b"a", b"b"}

        await eventually(are_registered)
    await redis.close()


@pytest.mark.parametrize(("forged", "crashes"), [("-7", 0), ("garbage", 0), ("nan", 0), ("2", 2)])
async def test_forged_crash_count_is_never_negative(valkey_url: str, forged: str, crashes: int) -> None:
    redis, group = RedisClient(valkey_url, ""), uuid.uuid4().hex
    await redis.client.set(f"sluice:{group}:crashes:s/1", forged)
    registry = crash_registry.CrashRegistry(redis, group, "member")
    assert await registry.register(["s/1"]) == [crashes]
    assert registry.in_flight == (set() if crashes else {"s/1"}), "a crash of this process counts"
    await redis.close()
