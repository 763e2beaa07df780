"""The outcome of one entry: systemic errors, submissions that expire, and submissions that block their partition."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.intake import processor
from pipelines.intake.processor import Processor
from services.core.errors import NotFound, ObjectOutOfScope, PolicyOutOfScope, SluiceError
from services.core.messages import DeadLetter, Submission, Verdict
from services.core.retry import UnjudgedBudget
from services.core.settings import Settings
from services.core.tenancy import Scope
from services.moderation.moderator import ModerationResult
from services.moderation.verdicts import build_skipped_verdict
from services.streams.base import Message, OutgoingMessage
from services.streams.parsing import ParsedSubmission

MESSAGE = Message(b"the original", b"key", (), "submissions/0/7", datetime.now(UTC))


def entry(name: str) -> ParsedSubmission:
    return ParsedSubmission(Submission(id=name, uri=f"s3://uploads/{name}.jpg"), b"key", MESSAGE.value, None)


class FakeModerator:
    """Judges every submission, raises `error`, or never ends for the submission "stuck"."""

    def __init__(self, error: SluiceError | None = None) -> None:
        self.error = error

    async def judge(self, submission: Submission, _scope: Scope) -> ModerationResult:
        if submission.id == "stuck":
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return ModerationResult(build_skipped_verdict(submission, "needs_review"))


class Pauses:
    """A `sleep` that records the pauses, and ends the one in progress when it is told to."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[float] = asyncio.Queue()
        self.end = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.begun.put_nowait(seconds)
        await self.end.wait()


class RecordingBudget(UnjudgedBudget):
    """A budget that says when it refused a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = asyncio.Event()

    def take(self) -> bool:
        taken = super().take()
        if not taken:
            self.refused.set()
        return taken


def make_processor(moderator: Any, *, sleep: Any = asyncio.sleep, **settings: Any) -> Processor:
    return Processor(moderator, Settings(**settings), sleep=sleep)


def read_letter(message: OutgoingMessage) -> DeadLetter:
    return DeadLetter.from_headers(message.headers)


async def test_systemic_error_beyond_the_budget_waits_instead_of_a_dead_letter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "_SYSTEMIC_ERRORS_IN_A_ROW", 5)
    moderator, pauses = FakeModerator(NotFound("no such object")), Pauses()
    judge = make_processor(moderator, sleep=pauses.sleep)
    for number in range(5):
        (letter,) = await judge.process(MESSAGE, entry(str(number)))
        assert read_letter(letter).reason == "not_found"
    waiting = asyncio.create_task(judge.process(MESSAGE, entry("waits")))
    assert await pauses.begun.get() == processor._SYSTEMIC_RETRY_S
    assert not waiting.done()
    moderator.error = None
    pauses.end.set()
    (verdict,) = await waiting
    assert Verdict.model_validate_json(verdict.value).submission_id == "waits"


@pytest.mark.parametrize("error", [ObjectOutOfScope("not yours"), PolicyOutOfScope("not yours")])
async def test_flood_of_submissions_out_of_scope_never_waits_and_takes_nothing_from_the_budget(
    monkeypatch: pytest.MonkeyPatch, error: SluiceError
) -> None:
    monkeypatch.setattr(processor, "_SYSTEMIC_ERRORS_IN_A_ROW", 5)
    moderator, pauses = FakeModerator(error), Pauses()
    judge = make_processor(moderator, sleep=pauses.sleep)
    for number in range(50):
        await asyncio.wait_for(judge.process(MESSAGE, entry(str(number))), 5)
    moderator.error = NotFound("no such object")
    for number in range(5):
        (letter,) = await asyncio.wait_for(judge.process(MESSAGE, entry(f"absent-{number}")), 5)
        assert read_letter(letter).reason == "not_found", "the flood has used nothing of the budget"
    assert pauses.begun.empty()


async def test_stuck_submission_expires_only_after_others_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_SYSTEMIC_RETRY_S", 0.001)
    judge = make_processor(FakeModerator(), judge_deadline_s=0.001)
    judge.expiry_budget = budget = RecordingBudget()
    stuck = asyncio.create_task(judge.process(MESSAGE, entry("stuck")))
    await budget.refused.wait()
    assert not stuck.done(), "alone, it may be an outage"
    for number in range(60):
        await judge.process(MESSAGE, entry(str(number)))
    (letter,) = await stuck
    assert read_letter(letter).reason == "expired"
    assert (letter.value, letter.key) == (MESSAGE.value, MESSAGE.key)


async def test_blocked_submission_ends_as_the_setting_says() -> None:
    (message,) = make_processor(FakeModerator()).make_blocked_outcome(MESSAGE, entry("blocked"))
    verdict = Verdict.model_validate_json(message.value)
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "blocked", "review")
    (letter,) = make_processor(FakeModerator(), blocked_as="dead_letter").make_blocked_outcome(MESSAGE, entry("b"))
    assert read_letter(letter).reason == "expired"
