"""The deadline of one message in a lane, on streams in memory."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pipelines.intake.crash_isolation import MAX_CRASHES
from pipelines.intake.lane import Lane
from pipelines.intake.processor import Processor
from services.core.messages import DeadLetter, Submission, Verdict
from services.core.settings import Settings
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

    async def judge(self, submission: Submission) -> ModerationResult:
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


class Bench:
    """A lane with one received message."""

    def __init__(self, isolation: FullIsolation, value: object) -> None:
        self.broker = MemoryBroker()
        self.isolation = isolation
        self.moderator: Any = RecordingModerator()
        self.consumer = MemoryGroupConsumer(self.broker, SETTINGS.submissions_stream, "group", 60)
        processor = Processor(self.moderator, SETTINGS)
        self.lane = Lane(self.consumer, processor, isolation, 4, "live")  # type: ignore[arg-type]
        self.value = json.dumps(value).encode()

    async def receive(self) -> None:
        await self.broker.publish([OutgoingMessage(SETTINGS.submissions_stream, self.value, b"key")])
        await self.lane.receive()

    def expire(self) -> None:
        for held in self.lane.in_flight.values():
            held.expire()

    async def finish(self) -> None:
        async with asyncio.timeout(5):
            await asyncio.gather(*self.lane.tasks)

    def verdicts(self) -> list[Verdict]:
        return [Verdict.model_validate_json(each.value) for each in self.broker.streams[SETTINGS.verdicts_stream]]

    def dead_letters(self) -> list[Message]:
        return self.broker.streams[SETTINGS.dead_letters_stream]


@pytest.mark.parametrize("crashes", range(MAX_CRASHES))
async def test_deadline_while_waiting_for_isolation_settles_the_message_once(crashes: int) -> None:
    bench = Bench(FullIsolation(crashes), {"id": "waits", "uri": "s3://uploads/waits.jpg"})
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
    bench = Bench(FullIsolation(MAX_CRASHES), {"id": "poison", "uri": "s3://uploads/poison.jpg"})
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

    bench = Bench(FreeIsolation(0), {"Records": [created("a.jpg", "01"), created("b.jpg", "02"), {"eventName": 5}]})
    judge = bench.moderator.judge

    async def stuck_at_b(submission: Submission) -> ModerationResult:
        stuck = submission.uri.endswith("b.jpg")
        result: ModerationResult = await judge(submission.model_copy(update={"id": "stuck"}) if stuck else submission)
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
