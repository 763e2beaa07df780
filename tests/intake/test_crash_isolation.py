"""Messages that kill the process that touches them, and those that merely stood by."""

import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from pipelines.intake.crash_isolation import CRASHES, Quarantine
from services.core.messages import DeadLetter, Verdict
from services.core.processes import SupervisedProcess
from services.policies.redis_cache import CacheUnavailable, PolicyRedisCache
from services.streams.base import OutgoingMessage
from tests.support.streams_bench import Streams, eventually


@pytest.mark.parametrize(
    ("kind", "poison"), [("redis", "deadly-to-read"), pytest.param("kafka", "deadly-to-judge", marks=pytest.mark.kafka)]
)
async def test_a_message_that_kills_costs_three_crashes(
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

    async def ends() -> Counter[str]:
        letters = await streams.everything(settings.dead_letters_stream)
        verdicts = await streams.everything(settings.verdicts_stream)
        judged = {Verdict.model_validate_json(each.value).submission_id for each in verdicts}
        return Counter([*judged, *(json.loads(each.value)["id"] for each in letters)])

    try:
        deadline = time.monotonic() + 150
        while set(await ends()) < set(ids):
            assert time.monotonic() < deadline, set(ids) - set(await ends())
            if member is None or member.returncode is not None:
                crashes += member is not None
                name = f"member-{crashes}"
                argv = [sys.executable, "-m", "tests.support.poisoned_member", settings.model_dump_json(), name]
                member = SupervisedProcess(argv, log=tmp_path / f"{name}.log")
            await asyncio.sleep(0.2)
        assert member is not None
        assert member.returncode is None
    finally:
        if member is not None:
            member.stop(grace_s=10)
    assert crashes == CRASHES
    assert await ends() == Counter(ids)
    (dead,) = await streams.everything(settings.dead_letters_stream)
    letter = DeadLetter.from_headers(dead.headers)
    assert (json.loads(dead.value)["id"], letter.reason, letter.attempts) == (poison, "guard_failed", CRASHES + 1)
    assert "crash" in letter.detail


async def test_whoever_has_been_in_two_crashes_is_worked_on_alone(valkey_url: str) -> None:
    shared = PolicyRedisCache(valkey_url, "alone")
    async with Quarantine(shared, "alone", "member") as quarantine:
        at_work: set[str] = set()
        seen: dict[str, set[str]] = {}

        async def work(source: str, crashes: int) -> None:
            async with quarantine.touching(source, crashes):
                at_work.add(source)
                await asyncio.sleep(0.05)
                seen[source] = set(at_work)
                at_work.remove(source)

        among = [work(f"innocent-{number}", number % 2) for number in range(30)]
        await asyncio.gather(*among[:15], work("suspect", 2), *among[15:], work("another", 2))
        assert seen["suspect"] == {"suspect"}
        assert seen["another"] == {"another"}
        assert max(map(len, seen.values())) > 10
        assert max(sum(int(each[9:]) % 2 for each in group if each[0] == "i") for group in seen.values()) <= 8
    await shared.close()


async def test_an_orderly_end_is_no_crash(valkey_url: str) -> None:
    shared = PolicyRedisCache(valkey_url, "orderly")
    async with Quarantine(shared, "orderly", "first") as first:
        assert await first.admit(["a", "b"]) == [0, 0]
        first.release("a")
    async with Quarantine(shared, "orderly", "second") as second:
        assert await second.admit(["a", "b"]) == [0, 0]
    await shared.close()


async def test_only_what_was_in_hand_was_in_the_crash(valkey_url: str) -> None:
    shared, group = PolicyRedisCache(valkey_url, "in-hand"), uuid.uuid4().hex
    first = Quarantine(shared, group, "first")  # never entered, so nobody hears of it again
    assert await first.admit(["done", "in hand"]) == [0, 0]
    first.release("done")
    await first.admit(["also in hand"])
    async with Quarantine(shared, group, "second") as second:

        async def counted() -> bool:
            return await second.admit(["in hand"]) == [1]

        await eventually(counted)
        assert await second.admit(["done", "also in hand"]) == [0, 1]
    await shared.close()


async def test_whoever_speaks_has_not_crashed_however_long_it_was_silent(valkey_url: str) -> None:
    """Redis may have stood still, or this process."""
    shared, group = PolicyRedisCache(valkey_url, "stands-still"), uuid.uuid4().hex
    quarantine = Quarantine(shared, group, "member")
    await quarantine.admit(["in hand"])
    await shared._redis.sadd(f"sluice:{group}:in-hand:dead", "in hand of the dead")
    await shared._redis.zadd(f"sluice:{group}:alive", {"member": 1, "dead": 1})
    await quarantine._mark()
    assert await Quarantine(shared, group, "new").admit(["in hand", "in hand of the dead"]) == [0, 1]
    await shared.close()


@pytest.mark.parametrize("crashes", [1, CRASHES - 1])
async def test_what_waits_does_not_hold_up_the_others(
    valkey_url: str, crashes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an object that never comes, say. One with two crashes would else stop the process for good, nine with one."""
    monkeypatch.setattr("pipelines.intake.crash_isolation._COMPANY_S", 0.2)
    shared = PolicyRedisCache(valkey_url, "waits")
    quarantine = Quarantine(shared, uuid.uuid4().hex, "member")
    for_ever, began = asyncio.Event(), asyncio.Semaphore(0)

    async def touch(source: str, crashes: int, *, wait: bool) -> None:
        async with quarantine.touching(source, crashes):
            began.release()
            if wait:
                await for_ever.wait()

    waiting = [asyncio.create_task(touch(f"waits-{number}", crashes, wait=True)) for number in range(9)]
    waiting += [asyncio.create_task(touch("is stuck", 0, wait=True))]
    async with asyncio.timeout(30):
        for _ in waiting:
            await began.acquire()
        for other in range(CRASHES):
            await touch("other", other, wait=False)
    assert quarantine._in_hand.isdisjoint(f"waits-{number}" for number in range(9)) == (crashes > 1)
    for_ever.set()
    await asyncio.gather(*waiting)
    assert (quarantine._working, quarantine._alone, quarantine._in_hand) == (0, None, set())
    await shared.close()


async def test_while_redis_is_away_only_the_beat_asks_it(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs takes seconds for each question."""
    shared = PolicyRedisCache(valkey_url, "away")
    asked: list[str] = []
    answer = shared.run

    async def hang(*_: object) -> None:
        asked.append("in vain")
        raise CacheUnavailable("no answer")

    quarantine = Quarantine(shared, "away", "member")
    monkeypatch.setattr(shared, "run", hang)
    assert await quarantine.admit(["a"]) == [0]
    assert await quarantine.admit(["b"]) == [0]
    async with quarantine.touching("c", 1):
        pass
    assert asked == ["in vain"]
    monkeypatch.setattr(shared, "run", answer)
    async with quarantine:  # its beat marks what came meanwhile

        async def marked() -> bool:
            return await shared._redis.smembers("sluice:away:in-hand:member") == {b"a", b"b"}

        await eventually(marked)
    await shared.close()
