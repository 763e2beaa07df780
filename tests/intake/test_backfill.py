"""Backfill is received only while less than half of the live lane is in use. The streams are in memory."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pipelines.intake import lane, worker
from pipelines.intake.worker import IntakeWorker
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.tenancy import Scope
from services.moderation.moderator import ModerationResult
from services.moderation.verdicts import build_skipped_verdict
from services.streams.base import Message, OutgoingMessage
from tests.intake.test_lane import FreeIsolation
from tests.support.memory_streams import MemoryBroker, MemoryGroupConsumer

SETTINGS = Settings(in_flight=4)


class RecordingConsumer(MemoryGroupConsumer):
    """Records the free slots of the live lane at each call of `receive`. It is idle between the calls."""

    worker: IntakeWorker

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, SETTINGS.backfill_stream, "group", 60)
        self.free_slots: list[int] = []
        self.idle = asyncio.Event()
        self.idle.set()

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        self.free_slots.append(self.worker.live.capacity)
        self.idle.clear()
        try:
            return await super().receive(max_messages, timeout_s)
        finally:
            self.idle.set()


class HoldingModerator:
    """Judges when it is told to, and counts what it has judged by priority."""

    def __init__(self) -> None:
        self.held = 0
        self.all_slots_taken = asyncio.Event()
        self.release = asyncio.Event()
        self.all_judged = asyncio.Event()
        self.judged: Counter[str] = Counter()

    async def judge(self, submission: Submission, _scope: Scope) -> ModerationResult:
        self.held += 1
        if self.held == SETTINGS.in_flight:
            self.all_slots_taken.set()
        await self.release.wait()
        self.judged[submission.priority] += 1
        if self.judged.total() == 11:
            self.all_judged.set()
        return ModerationResult(build_skipped_verdict(submission, "needs_review"))


async def test_backfill_while_the_live_lane_is_full_is_not_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "RECEIVE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(worker, "RECEIVE_TIMEOUT_S", 0.01)
    broker = MemoryBroker()

    async def submit(stream: str, count: int) -> None:
        for number in range(count):
            value = json.dumps({"id": f"{stream}-{number}", "uri": f"s3://uploads/{number}.jpg"}).encode()
            await broker.publish([OutgoingMessage(stream, value, str(number).encode())])

    moderator: Any = HoldingModerator()
    isolation: Any = FreeIsolation(0)
    backfill = RecordingConsumer(broker)
    live = MemoryGroupConsumer(broker, SETTINGS.submissions_stream, "group", 60)
    backfill.worker = IntakeWorker(live, moderator, SETTINGS, isolation, backfill=backfill)
    await submit(SETTINGS.submissions_stream, 8)
    async with asyncio.timeout(10):
        await moderator.all_slots_taken.wait()
        await backfill.idle.wait()  # a call may have begun before the live lane was full
        calls = len(backfill.free_slots)
        await submit(SETTINGS.backfill_stream, 3)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(backfill.free_slots) == calls
        moderator.release.set()
        await moderator.all_judged.wait()
        await backfill.worker.drain()
    assert moderator.judged == {"live": 8, "backfill": 3}
    assert min(backfill.free_slots) >= SETTINGS.in_flight / 2
