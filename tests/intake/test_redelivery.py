"""A message that is redelivered while it is in flight, because its partition was revoked and assigned again."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.worker import IntakeWorker
from services.core.errors import NotOwned
from services.core.messages import Submission
from services.core.redis import RedisClient
from services.core.settings import Settings
from services.core.tenancy import Scope
from services.moderation.moderator import ModerationResult
from services.moderation.verdicts import build_skipped_verdict
from services.streams.base import Lag, Message, OutgoingMessage


class RebalancedConsumer:
    """A consumer whose first assignment is revoked before anything is settled."""

    worker: IntakeWorker

    def __init__(self, *messages: Message) -> None:
        self._left = list(messages)
        self.unknown: list[Message] = []
        """Messages that the worker did not know as in flight when it settled them."""
        self.settled: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        if not self._left:
            await asyncio.sleep(timeout_s)
        batch, self._left = self._left[:max_messages], self._left[max_messages:]
        return batch

    async def settle(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        if message.token == "first assignment":
            raise NotOwned("it went to another member")
        if message.source not in self.worker.live.in_flight:
            self.unknown.append(message)
        self.settled.put_nowait(message)

    async def lag(self) -> Lag:
        return Lag({})

    def find_head_of_line_messages(self) -> Sequence[Message]:
        return []

    async def close(self) -> None:
        pass


class FakeModerator:
    """Judges after the messages of one batch have all been received."""

    async def judge(self, submission: Submission, _scope: Scope) -> ModerationResult:
        await asyncio.sleep(0)
        return ModerationResult(build_skipped_verdict(submission, "needs_review"))


def message(offset: int, assignment: str) -> Message:
    value = b'{"id": "%d", "uri": "s3://uploads/a.jpg"}' % offset
    return Message(value, b"key", (), f"submissions/0/{offset}", datetime.now(UTC), token=assignment)


async def test_redelivered_message_and_those_behind_it_are_settled_once() -> None:
    again = [message(offset, "second assignment") for offset in range(3)]
    consumer: Any = RebalancedConsumer(message(0, "first assignment"), message(1, "first assignment"), *again)
    moderator: Any = FakeModerator()
    redis = RedisClient("redis://127.0.0.1:1", "sluice:")  # no server listens there
    consumer.worker = IntakeWorker(consumer, moderator, Settings(), CrashIsolation(redis, "sluice", "member"))
    settled = [await asyncio.wait_for(consumer.settled.get(), 5) for _ in again]
    await consumer.worker.drain()
    assert settled == again
    assert consumer.unknown == []
    assert consumer.worker.live.in_flight == {}
