"""The life of one image: the only place that knows the order of the steps.

    policy ► fetch ► prepare ► guard ► decide ► verdict

What it needs comes as arguments, so that the stream, the gateway and data sets share it.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from services import telemetry
from services.contracts import (
    Action,
    Assessment,
    Detail,
    Effort,
    ObjectReference,
    Policy,
    PreparedImage,
    Priority,
    StoredObject,
    Submission,
    Timings,
    Verdict,
    verdict_id,
)
from services.errors import Unavailable, UnreadableAnswer

log = logging.getLogger(__name__)
T = TypeVar("T")


class PolicySource(Protocol):
    """Where policies come from."""

    async def resolve(self, reference: str) -> Policy:
        """The policy for `name` or `name@version`. Raises UnknownPolicy, PolicyUnavailable."""


class ImageSource(Protocol):
    """Where images come from."""

    def open(self, reference: ObjectReference) -> AbstractAsyncContextManager[StoredObject]:
        """The object, with the memory it takes reserved until the context ends.

        Raises Forbidden, NotFound, Changed, TooLarge, StoreUnavailable.
        """


class ImagePreparer(Protocol):
    """Makes of an image what the model can use."""

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode, orient, downscale. Raises NotAnImage, TooLarge, Unavailable."""

    async def first_look(self, image: PreparedImage) -> PreparedImage:
        """The same image small enough for a first look. Raises what `prepare` raises."""


class Guard(Protocol):
    """The model: pure inference."""

    async def assess(self, image: PreparedImage, policy: Policy, detail: Detail, priority: Priority) -> Assessment:
        """Judge one image under one policy. Raises GuardFailed, GuardUnavailable, UnreadableAnswer."""


@dataclass(slots=True)
class _Clock:
    """Milliseconds by step, of one submission."""

    submitted_at: datetime
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    ms: dict[str, int] = field(default_factory=dict)

    async def time(self, step: str, work: Awaitable[T]) -> T:
        started = time.perf_counter()
        result = await work
        self._record(step, time.perf_counter() - started)
        return result

    def finish(self, judged_at: datetime) -> Timings:
        self._record("queued", (self.started_at - self.submitted_at).total_seconds())
        self._record("total", (judged_at - self.submitted_at).total_seconds())
        return Timings(**self.ms)

    def _record(self, step: str, seconds: float) -> None:
        seconds = max(0.0, seconds)  # the producer's clock may be ahead of ours
        telemetry.STEP_SECONDS.observe(seconds, {"step": step})
        self.ms[step] = round(seconds * 1000)


class Moderation:
    """Judges submissions. Whatever is away is waited for: a caller in a hurry cancels."""

    def __init__(self, *, policies: PolicySource, images: ImageSource, preparer: ImagePreparer, guard: Guard) -> None:
        self._policies = policies
        self._images = images
        self._preparer = preparer
        self._guard = guard

    async def judge(self, submission: Submission) -> Verdict:
        """The verdict for one submission.

        Raises:
            Unjudgeable: it can never be judged; the error's class says why.
        """
        clock = _Clock(submission.submitted_at or datetime.now(UTC))
        policy = await patiently(lambda: self._policies.resolve(submission.policy))
        async with AsyncExitStack() as held:
            fetch = partial(self._images.open, submission.reference)
            stored = await clock.time("fetch", patiently(lambda: held.enter_async_context(fetch())))
            image = await clock.time("prepare", patiently(lambda: self._preparer.prepare(stored.data)))
            assessing = assess(image, policy, submission.priority, guard=self._guard, preparer=self._preparer)
            answer, effort = await clock.time("guard", assessing)
        return _verdict(submission, stored, image, policy, answer, effort, clock)


async def assess(
    image: PreparedImage, policy: Policy, priority: Priority, *, guard: Guard, preparer: ImagePreparer
) -> tuple[Assessment | UnreadableAnswer, Effort]:
    """With the policy's effort: what the guard says, or why its answer could not be read twice.

    Raises:
        GuardFailed: the engine refuses the image.
    """
    if policy.effort == "adaptive":
        small = await patiently(lambda: preparer.first_look(image))
        look = await patiently(lambda: guard.assess(small, policy, "score", priority))
        accepted = look.score < policy.first_look_below
        telemetry.FIRST_LOOKS.inc(1, {"result": "accepted" if accepted else "escalated"})
        if accepted:
            return look, "first_look"
    full = partial(guard.assess, image, policy, "verdict", priority)
    try:
        try:
            return await patiently(full), "full"
        except UnreadableAnswer:
            return await patiently(full), "full"
    except UnreadableAnswer as error:
        return error, "full"


def decide(assessment: Assessment, policy: Policy) -> Action:
    """What the policy's thresholds make of an assessment."""
    thresholds = policy.category_thresholds.get(assessment.category, policy.thresholds)
    if assessment.score >= thresholds.block:
        return "block"
    return "review" if assessment.score >= thresholds.review else "allow"


async def patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Repeat `step` with full jitter, up to 10 s apart, for as long as something it needs is away."""

    def count(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        telemetry.WAITS.inc(1, {"error": type(error).__name__})
        log.log(logging.WARNING if state.attempt_number == 3 else logging.DEBUG, "waiting: %s", error)

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        before_sleep=count,
        reraise=True,
    )

    async def attempt() -> T:
        return await step()  # tenacity awaits coroutine functions only, not whatever returns an awaitable

    return await retrying(attempt)


def _verdict(
    submission: Submission,
    stored: StoredObject,
    image: PreparedImage,
    policy: Policy,
    answer: Assessment | UnreadableAnswer,
    effort: Effort,
    clock: _Clock,
) -> Verdict:
    assessment = answer if isinstance(answer, Assessment) else None
    judged_at = datetime.now(UTC)
    return Verdict(
        verdict_id=verdict_id(
            submission_id=submission.id,
            uri=submission.uri,
            object_version=stored.version_id or stored.etag or image.sha256,
            policy_digest=policy.identity.digest,
            model_revision=answer.model.revision if answer.model else "",
        ),
        submission_id=submission.id,
        uri=submission.uri,
        version_id=stored.version_id,
        etag=stored.etag,
        sha256=image.sha256,
        tenant=submission.tenant,
        outcome="verdict" if assessment else "needs_review",
        reason=None if assessment else "unreadable_answer",
        rating=assessment.rating if assessment else None,
        category=assessment.category if assessment else None,
        rationale=assessment.rationale if assessment else None,
        score=assessment.score if assessment else None,
        action=decide(assessment, policy) if assessment else "review",
        policy=policy.identity,
        model=answer.model,
        effort=effort,
        image=image.facts,
        timings_ms=clock.finish(judged_at),
        metadata=submission.metadata,
        submitted_at=clock.submitted_at,
        judged_at=judged_at,
    )
