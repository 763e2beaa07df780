"""The processor makes the outgoing messages of one entry: verdicts or a dead letter. It uses no stream."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

from services.core import telemetry
from services.core.errors import (
    Expired,
    Forbidden,
    GuardFailed,
    NotFound,
    ObjectOutOfScope,
    PolicyOutOfScope,
    Unjudgeable,
    UnknownPolicy,
)
from services.core.messages import DeadLetter, remove_own_headers
from services.core.retry import UnjudgedBudget
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.core.tenancy import Tenancy
from services.moderation.moderator import ModerationResult, Moderator
from services.moderation.verdicts import build_skipped_verdict
from services.policies.traffic_sample import TrafficSample
from services.streams.base import Message, OutgoingMessage
from services.streams.parsing import InvalidMessage, ParsedSubmission

_MAX_DETAIL_CHARS: Final = 500
_SYSTEMIC_RETRY_S: Final = 15.0
"""Pause between tries of a submission while the budget of systemic errors is empty."""
_EXPIRY_CHECK_S: Final = 15.0
"""Time after the judge deadline between two checks whether other submissions were judged."""

_SYSTEMIC_ERRORS: Final = (Forbidden, NotFound, UnknownPolicy, GuardFailed)
"""Errors that can be systemic: a wrong setting or a broken component can cause them for every submission."""
_ERRORS_OF_ONE_TENANT: Final = (ObjectOutOfScope, PolicyOutOfScope)
"""Never systemic: a flood of one tenant's submissions for objects or policies of others must not hold up the stream."""
_SYSTEMIC_ERRORS_IN_A_ROW: Final = 500
_SYSTEMIC_ERRORS_PER_SUCCESS: Final = 10.0

log = logging.getLogger(__name__)


class Processor:
    """Judges the entries of messages, and makes their outcomes. All lanes of a member share one processor."""

    def __init__(
        self,
        moderator: Moderator,
        settings: Settings,
        sample: TrafficSample | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.expiry_budget = UnjudgedBudget()
        """Submissions that may expire: a small share of the judged ones, and none while nothing can be judged."""
        self._systemic_budget = UnjudgedBudget(
            _SYSTEMIC_ERRORS_PER_SUCCESS, _SYSTEMIC_ERRORS_IN_A_ROW, _SYSTEMIC_ERRORS_IN_A_ROW
        )
        self.tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
        self._moderator = moderator
        self._settings = settings
        self._sample = sample
        self._sleep = sleep

    async def process(self, message: Message, entry: ParsedSubmission) -> list[OutgoingMessage]:
        """Return the verdict of a submission, with a shadow version's verdict if there is one, or its dead letter."""
        return self.make_outcome(message, entry, await self.judge(entry))

    def make_outcome(
        self, message: Message, entry: ParsedSubmission, result: ModerationResult | Unjudgeable
    ) -> list[OutgoingMessage]:
        """Return the verdicts, or the dead letter, of a result of `judge`."""
        if isinstance(result, Unjudgeable):
            return [self.make_dead_letter(message, entry.original, result, entry.submission.id)]
        return self._make_verdicts(entry, result)

    async def judge(self, entry: ParsedSubmission) -> ModerationResult | Unjudgeable:
        """Judge a submission, or return why it can never be judged."""
        while True:
            try:
                result = await self._judge(entry)
            except Unjudgeable as error:
                is_systemic = isinstance(error, _SYSTEMIC_ERRORS) and not isinstance(error, _ERRORS_OF_ONE_TENANT)
                if not is_systemic or self._systemic_budget.take():
                    return error
                # A wrong bucket policy or a broken checkpoint must not turn the whole stream into dead letters.
                log.error(
                    "too many submissions fail, maybe for a common cause; submission %s is tried again in %d s: %s",
                    *(entry.submission.id, _SYSTEMIC_RETRY_S, error),
                )
                telemetry.count_retry(error)
                await self._sleep(_SYSTEMIC_RETRY_S)
            else:
                self.expiry_budget.record_success()
                self._systemic_budget.record_success()
                return result

    async def is_replaced(self, entry: ParsedSubmission) -> bool:
        """Whether the object version of an S3 event is not the present one. False if the store does not tell."""
        try:
            return not await self._moderator.is_current_version(entry.submission)
        except NotFound:
            return True
        except Unjudgeable:
            return False

    def reject(self, message: Message, entry: InvalidMessage) -> list[OutgoingMessage]:
        """Return the dead letter of an entry that is no valid submission."""
        return [self.make_dead_letter(message, entry.original, entry.error, entry.error.submission_id)]

    def make_superseded_verdict(self, entry: ParsedSubmission) -> list[OutgoingMessage]:
        """Return the verdict of an S3 event that a later event of the same object has overtaken."""
        return self._make_verdicts(entry, ModerationResult(build_skipped_verdict(entry.submission, "superseded")))

    def make_blocked_outcome(self, message: Message, entry: ParsedSubmission) -> list[OutgoingMessage]:
        """Return the outcome of a submission whose message blocked its partition when the deadline had passed."""
        if self._settings.blocked_as == "needs_review":
            verdict = build_skipped_verdict(entry.submission, "needs_review", reason="blocked", action="review")
            return self._make_verdicts(entry, ModerationResult(verdict))
        error = Expired(
            f"the submission blocks its partition more than {self._settings.blocked_deadline_s:g} s after its receipt"
        )
        return [self.make_dead_letter(message, entry.original, error, entry.submission.id)]

    def make_dead_letter(
        self, message: Message, original: bytes, error: Unjudgeable, submission_id: str | None
    ) -> OutgoingMessage:
        """Return the dead letter of a submission that can never be judged."""
        letter = DeadLetter(
            submission_id=submission_id,
            reason=error.reason,
            detail=" ".join(str(error).split())[:_MAX_DETAIL_CHARS],
            attempts=message.attempts,
            source=message.source,
            failed_at=datetime.now(UTC),
        )
        telemetry.count_result("dead_letter", letter.reason)
        log.info("submission %s is a dead letter: %s", submission_id, letter.reason)
        headers = (*letter.headers(), *remove_own_headers(message.headers))
        return OutgoingMessage(self._settings.dead_letters_stream, original, message.key, headers)

    async def _judge(self, entry: ParsedSubmission) -> ModerationResult:
        """
        Raises:
            Expired: the submission could not be judged in time, although others were.
            Unjudgeable: the submission can never be judged.
        """
        scope = self.tenancy.find_scope(entry.submission.tenant)
        judging = asyncio.ensure_future(self._moderator.judge(entry.submission, scope))
        timeout_s = self._settings.judge_deadline_s
        try:
            while True:
                await asyncio.wait([judging], timeout=timeout_s)
                if judging.done():
                    return judging.result()
                if self.expiry_budget.take():
                    raise Expired(
                        f"the submission could not be judged within {self._settings.judge_deadline_s:g} s, "
                        "although others were"
                    )
                timeout_s = _EXPIRY_CHECK_S
        finally:
            await cancel_and_wait(judging)

    def _make_verdicts(self, entry: ParsedSubmission, result: ModerationResult) -> list[OutgoingMessage]:
        verdict, shadow = result.verdict, result.shadow
        telemetry.count_result(verdict.outcome, verdict.reason)
        if self._sample:
            self._sample.add(verdict)
        streams = self._settings
        messages = [OutgoingMessage(streams.verdicts_stream, verdict.model_dump_json().encode(), entry.key)]
        if shadow:
            messages.append(
                OutgoingMessage(streams.shadow_verdicts_stream, shadow.model_dump_json().encode(), entry.key)
            )
        return messages
