"""One lane on streams in memory: the deadline of a message, its retries, and blocked partitions."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pipelines.intake.crash_isolation import MAX_CRASHES
from pipelines.intake.lane import Lane
from pipelines.intake.processor import Processor
from services.core.errors import ConfigurationError
from services.core.messages import DeadLetter, Submission, Verdict
from services.core.settings import Settings
from services.core.tenancy import Scope
from services.moderation.moderator import ModerationResult
from services.moderation.verdicts import build_skipped_verdict
from services.streams.base import Message, OutgoingMessage
from tests.support.memory_streams import MemoryBroker, MemoryGroupConsumer

SETTINGS = Settings()


class FullIsolation:
    """A `CrashIsolation` with no free slot. Every message has the same number of crashes."""

    def __init__(self, crashes: int) -> None:
        self.crashes = crashes
        self.waiting = asyncio.Event()
        self.released: list[str] = []

    async def register(self, sources: Sequence[str]) -> list[int]:
        return [self.crashes] * len(sources)

    def release(self, source: str) -> None:
        self.released.append(source)

    @asynccontextmanager
    async def isolate(self, source: str, crashes: int, *, parse: bool = False) -> AsyncIterator[None]:
        if not parse:
            self.waiting.set()
            await asyncio.Event().wait()
        yield


class RecordingModerator:
    """Keeps the submission "stuck" for ever, and judges every other one at once."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.stuck = asyncio.Event()

    async def judge(self, submission: Submission, _scope: Scope) -> ModerationResult:
        if submission.id == "stuck":
            self.stuck.set()
            await asyncio.Event().wait()
        self.judged.append(submission.id)
        return ModerationResult(build_skipped_verdict(submission, "needs_review"))


class FreeIsolation(FullIsolation):
    """A `CrashIsolation` that never waits."""

    @asynccontextmanager
    async def isolate(self, source: str, crashes: int, *, parse: bool = False) -> AsyncIterator[None]:
        yield


class LaneBench:
    """A lane on streams in memory. Its clock is `now_s`, and it sleeps as `sleep` does."""

    def __init__(
        self,
        isolation: FullIsolation,
        value: object,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.broker = MemoryBroker()
        self.isolation = isolation
        self.moderator: Any = RecordingModerator()
        self.consumer = MemoryGroupConsumer(self.broker, SETTINGS.submissions_stream, "group", 60)
        self.processor = Processor(self.moderator, SETTINGS)
        self.now_s = 0.0
        self.lane = Lane(
            self.consumer,
            self.processor,
            isolation,  # type: ignore[arg-type]
            4,
            "live",
            clock=lambda: self.now_s,
            sleep=sleep,
        )
        self.value = json.dumps(value).encode()

    async def receive(self) -> None:
        await self.broker.publish([OutgoingMessage(SETTINGS.submissions_stream, self.value, b"key")])
        await self.lane.receive()

    def expire(self) -> None:
        for held in self.lane.in_flight.values():
            held.stop_processing()

    async def finish(self) -> None:
        async with asyncio.timeout(5):
            await asyncio.gather(*self.lane.tasks)

    def verdicts(self) -> list[Verdict]:
        return [Verdict.model_validate_json(each.value) for each in self.broker.streams[SETTINGS.verdicts_stream]]

    def dead_letters(self) -> list[Message]:
        return self.broker.streams[SETTINGS.dead_letters_stream]


@pytest.mark.parametrize("crashes", range(MAX_CRASHES))
async def test_deadline_while_waiting_for_isolation_settles_the_message_once(crashes: int) -> None:
    bench = LaneBench(FullIsolation(crashes), {"id": "waits", "uri": "s3://uploads/waits.jpg"})
    await bench.receive()
    await bench.isolation.waiting.wait()
    bench.expire()
    bench.expire()  # a second call changes nothing
    await bench.finish()
    (verdict,) = bench.verdicts()
    assert (verdict.submission_id, verdict.outcome, verdict.reason) == ("waits", "needs_review", "blocked")
    assert bench.dead_letters() == []
    assert bench.moderator.judged == []
    assert (await bench.consumer.lag()).total == 0, "the message is settled"
    assert len(bench.isolation.released) == 1


async def test_deadline_of_a_confirmed_poison_message_keeps_its_dead_letter() -> None:
    bench = LaneBench(FullIsolation(MAX_CRASHES), {"id": "poison", "uri": "s3://uploads/poison.jpg"})
    await bench.receive()
    bench.expire()
    await bench.finish()
    (letter,) = bench.dead_letters()
    assert DeadLetter.from_headers(letter.headers).reason == "guard_failed"
    assert bench.verdicts() == []


async def test_deadline_keeps_the_outputs_of_finished_entries() -> None:
    def created(key: str, sequencer: str) -> dict[str, object]:
        s3 = {"bucket": {"name": "uploads"}, "object": {"key": key, "sequencer": sequencer}}
        return {"eventName": "ObjectCreated:Put", "s3": s3}

    bench = LaneBench(FreeIsolation(0), {"Records": [created("a.jpg", "01"), created("b.jpg", "02"), {"eventName": 5}]})
    judge = bench.moderator.judge

    async def stuck_at_b(submission: Submission, scope: Scope) -> ModerationResult:
        if submission.uri.endswith("b.jpg"):
            submission = submission.model_copy(update={"id": "stuck"})
        result: ModerationResult = await judge(submission, scope)
        return result

    bench.moderator.judge = stuck_at_b
    await bench.receive()
    await bench.moderator.stuck.wait()
    bench.expire()
    await bench.finish()
    reasons = {verdict.uri: verdict.reason for verdict in bench.verdicts()}
    assert reasons == {"s3://uploads/a.jpg": None, "s3://uploads/b.jpg": "blocked"}
    (letter,) = bench.dead_letters()
    assert DeadLetter.from_headers(letter.headers).reason == "malformed"


async def test_failed_settle_after_deadline_backs_off() -> None:
    pauses_s: list[float] = []

    async def record(seconds: float) -> None:
        pauses_s.append(seconds)
        if len(pauses_s) == 4:
            bench.consumer.settle = settle  # type: ignore[method-assign]

    async def refuse(*_: object) -> None:
        bench.expire()
        raise ConfigurationError("the verdict is too large for its stream")

    bench = LaneBench(FreeIsolation(0), {"id": "refused", "uri": "s3://uploads/refused.jpg"}, sleep=record)
    settle, bench.consumer.settle = bench.consumer.settle, refuse  # type: ignore[method-assign]
    await bench.receive()
    await bench.finish()
    assert pauses_s == [1, 5, 30, 30]
    assert len(bench.verdicts()) == 1


async def test_blocking_message_is_settled_once_others_succeed() -> None:
    bench = LaneBench(FreeIsolation(0), {"id": "stuck", "uri": "s3://uploads/stuck.jpg"})
    bench.consumer.find_head_of_line_messages = lambda: [held.message for held in bench.lane.in_flight.values()]  # type: ignore[method-assign]
    await bench.receive()
    await bench.moderator.stuck.wait()
    for _ in range(60):
        bench.processor.expiry_budget.record_success()
    bench.now_s = 600.0
    bench.lane.stop_head_of_line_messages(600)
    assert not any(held.blocked_deadline_passed for held in bench.lane.in_flight.values()), (
        "its deadline has not passed"
    )
    bench.now_s = 600.1
    bench.lane.stop_head_of_line_messages(600)
    await bench.finish()
    (verdict,) = bench.verdicts()
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "blocked", "review")


async def test_blocking_message_while_nothing_succeeds_is_kept() -> None:
    bench = LaneBench(FreeIsolation(0), {"id": "stuck", "uri": "s3://uploads/stuck.jpg"})
    bench.consumer.find_head_of_line_messages = lambda: [held.message for held in bench.lane.in_flight.values()]  # type: ignore[method-assign]
    await bench.receive()
    await bench.moderator.stuck.wait()
    bench.now_s = 1e6
    bench.lane.stop_head_of_line_messages(600)
    (held,) = bench.lane.in_flight.values()
    assert not held.blocked_deadline_passed, "alone, it may be an outage"
    bench.expire()
    await bench.finish()
