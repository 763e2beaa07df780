"""The life of one image: the only place that knows the order of the steps.

    policy ► fetch ► prepare ► guard ► decide ► verdict

What it needs comes as arguments, so that the stream, the gateway and data sets share it.
"""

import time
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, TypeVar

from services.core import telemetry
from services.core.errors import GuardFailed, UnreadableAnswer
from services.core.messages import (
    Action,
    AppliedCalibration,
    Assessment,
    Detail,
    Effort,
    GuardPriority,
    ObjectReference,
    Policy,
    PolicyChoice,
    PreparedImage,
    ReviewReason,
    StoredObject,
    Submission,
    Timings,
    Verdict,
    VerdictOutcome,
    verdict_id,
)
from services.core.retry import retry_while_unavailable

T = TypeVar("T")


class PolicySource(Protocol):
    """Where policies come from."""

    async def choose(self, submission: Submission) -> PolicyChoice:
        """What a submission is judged by. Raises UnknownPolicy, PolicyUnavailable."""


class Breaker(Protocol):
    """Keeps a policy version from blocking too much."""

    def allows(self, policy: Policy, action: Action) -> bool:
        """Count a verdict's action, and say whether it may stand."""


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


class GuardClient(Protocol):
    """The model: pure inference."""

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        """Judge one image under several policies. Raises GuardFailed, GuardUnavailable, UnreadableAnswer."""


@dataclass(slots=True)
class _Clock:
    """Milliseconds by step, of one submission."""

    submitted_at: datetime
    started_at: datetime
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


@dataclass(frozen=True, slots=True)
class ModerationResult:
    """What comes of one submission: its verdict, and what another version would have said."""

    verdict: Verdict
    shadow: Verdict | None = None


class Moderation:
    """Judges submissions. Whatever is away is waited for: a caller in a hurry cancels."""

    def __init__(
        self,
        *,
        policies: PolicySource,
        images: ImageSource,
        preparer: ImagePreparer,
        guard: GuardClient,
        breaker: Breaker | None = None,
    ) -> None:
        self._policies = policies
        self._images = images
        self._preparer = preparer
        self._guard = guard
        self._breaker = breaker

    async def judge(
        self,
        submission: Submission,
        *,
        upload: StoredObject | None = None,
        priority: GuardPriority | None = None,
        detail: Detail = "verdict",
    ) -> ModerationResult:
        """The verdict for one submission, by the version that is its policy's now.

        `upload` is the image where it came with the request: then nothing is fetched. `priority` is the submission's
        priority unless given. With detail `score` the guard is not asked for a category and a rationale.

        Raises:
            Unjudgeable: it can never be judged; the error's class says why.
        """
        started_at = datetime.now(UTC)
        choice = await retry_while_unavailable(lambda: self._policies.choose(submission))
        policies = [choice.policy] if choice.shadow is None else [choice.policy, choice.shadow]
        verdict, *others = await self.judge_under(
            submission, policies, started_at, upload=upload, priority=priority, detail=detail
        )
        if isinstance(verdict, GuardFailed):
            raise verdict
        shadow = _shadow_difference(verdict, choice.shadow, others[0]) if choice.shadow else None
        return ModerationResult(self._apply_circuit_breaker(verdict, choice.policy), shadow)

    async def judge_under(
        self,
        submission: Submission,
        policies: Sequence[Policy],
        started_at: datetime | None = None,
        *,
        upload: StoredObject | None = None,
        priority: GuardPriority | None = None,
        detail: Detail = "verdict",
    ) -> list[Verdict | GuardFailed]:
        """What each of these policies makes of one submission, whatever its own says; nothing is counted.

        The rest is as for `judge`.

        Raises:
            Unjudgeable: the image cannot be had or prepared.
        """
        clock = _Clock(submission.submitted_at or datetime.now(UTC), started_at or datetime.now(UTC))
        async with AsyncExitStack() as held:
            stored = upload if upload else await clock.time("fetch", self._fetch(submission, held))
            image = await clock.time("prepare", retry_while_unavailable(lambda: self._preparer.prepare(stored.data)))
            priority = priority or submission.priority
            assessing = assess_each(
                image, policies, priority, guard=self._guard, preparer=self._preparer, detail=detail
            )
            answers = await clock.time("guard", assessing)
        return [
            answer
            if isinstance(answer, GuardFailed)
            else build_verdict(submission, stored, image, policy, answer, clock)
            for policy, answer in zip(policies, answers, strict=True)
        ]

    async def _fetch(self, submission: Submission, held: AsyncExitStack) -> StoredObject:
        fetch = partial(self._images.open, submission.reference)
        return await retry_while_unavailable(lambda: held.enter_async_context(fetch()))

    def _apply_circuit_breaker(self, verdict: Verdict, policy: Policy) -> Verdict:
        """The verdict, or a request for review where the policy's circuit breaker is open."""
        identity, action = policy.identity, verdict.action
        if self._breaker and action and verdict.outcome == "verdict" and not self._breaker.allows(policy, action):
            verdict = verdict.model_copy(update={"outcome": "needs_review", "reason": "quota", "action": "review"})
        telemetry.ACTIONS.inc(
            1, {"policy": identity.name, "version": str(identity.version), "action": verdict.action or ""}
        )
        return verdict


@dataclass(frozen=True, slots=True)
class PolicyAssessment:
    """What the guard says under one policy, or why that could not be read twice."""

    said: Assessment | UnreadableAnswer
    effort: Effort
    detail: Detail = "verdict"


async def assess_each(
    image: PreparedImage,
    policies: Sequence[Policy],
    priority: GuardPriority,
    *,
    guard: GuardClient,
    preparer: ImagePreparer,
    detail: Detail = "verdict",
) -> list[PolicyAssessment | GuardFailed]:
    """What the guard says under each policy, with its effort, or that the engine refuses the image under it."""
    answers: list[PolicyAssessment | GuardFailed | None] = [None] * len(policies)
    adaptive = [n for n, policy in enumerate(policies) if policy.effort == "adaptive"]
    if adaptive:
        looks = await screen(image, [policies[n] for n in adaptive], priority, guard=guard, preparer=preparer)
        for n, look in zip(adaptive, looks, strict=True):
            answers[n] = look
    rest = [n for n, answer in enumerate(answers) if answer is None]
    if rest:
        full = await _assess_full(image, [policies[n] for n in rest], priority, guard, detail)
        for n, answer in zip(rest, full, strict=True):
            answers[n] = answer
    return [answer for answer in answers if answer is not None]


async def screen(
    image: PreparedImage,
    policies: Sequence[Policy],
    priority: GuardPriority,
    *,
    guard: GuardClient,
    preparer: ImagePreparer,
) -> list[PolicyAssessment | None]:
    """What a first look is enough for, None for the others."""
    small = await retry_while_unavailable(lambda: preparer.first_look(image))
    try:
        looks = await _assess(small, policies, "score", priority, guard)
    except (GuardFailed, UnreadableAnswer):
        return [None] * len(policies)  # the full judgement says what is wrong
    answers = [
        PolicyAssessment(look, "first_look") if look.rating == "Safe" and look.score < policy.first_look_below else None
        for policy, look in zip(policies, looks, strict=True)
    ]
    for answer in answers:
        telemetry.FIRST_LOOKS.inc(1, {"result": "accepted" if answer else "escalated"})
    return answers


async def _assess_full(
    image: PreparedImage, policies: Sequence[Policy], priority: GuardPriority, guard: GuardClient, detail: Detail
) -> list[PolicyAssessment | GuardFailed]:
    """Judge under all of them in one call, so that the engine reads the image once; where that fails, one by one."""
    try:
        said = await _assess(image, policies, detail, priority, guard)
        return [PolicyAssessment(assessment, "full", detail) for assessment in said]
    except (GuardFailed, UnreadableAnswer) as error:
        if isinstance(error, GuardFailed) and len(policies) == 1:
            return [error]
        return [await _retry_full(image, policy, priority, guard, detail) for policy in policies]


async def _retry_full(
    image: PreparedImage, policy: Policy, priority: GuardPriority, guard: GuardClient, detail: Detail
) -> PolicyAssessment | GuardFailed:
    try:
        (assessment,) = await _assess(image, [policy], detail, priority, guard)
        return PolicyAssessment(assessment, "full", detail)
    except UnreadableAnswer as error:
        return PolicyAssessment(error, "full")
    except GuardFailed as error:
        return error


async def _assess(
    image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority, guard: GuardClient
) -> list[Assessment]:
    """What the guard says under each policy, with calibrated scores: all thresholds are about those."""
    said = await retry_while_unavailable(lambda: guard.assess_each(image, policies, detail, priority))
    return [apply_calibration(assessment, policy) for assessment, policy in zip(said, policies, strict=True)]


def _shadow_difference(verdict: Verdict, shadow: Policy, other: Verdict | GuardFailed) -> Verdict | None:
    """The shadow's verdict, counted by whether it differs."""
    result = "failed"
    if isinstance(other, Verdict):
        result = "same" if other.action == verdict.action else "differs"
    identity = shadow.identity
    telemetry.SHADOWS.inc(1, {"policy": identity.name, "version": str(identity.version), "result": result})
    return other if isinstance(other, Verdict) else None


def apply_calibration(assessment: Assessment, policy: Policy) -> Assessment:
    """The assessment with the probability that the policy's calibration for this checkpoint makes of its score."""
    calibration = policy.calibrations.get(assessment.model.revision)
    if calibration is None:
        return assessment
    applied = AppliedCalibration(digest=calibration.digest, raw_score=assessment.score)
    return replace(assessment, score=calibration.probability(assessment.score), calibration=applied)


def decide(assessment: Assessment, policy: Policy) -> Action:
    """What the policy's thresholds make of an assessment."""
    thresholds = policy.category_thresholds.get(assessment.category, policy.thresholds)
    if assessment.score >= thresholds.block:
        return "block"
    return "review" if assessment.score >= thresholds.review else "allow"


def skipped_verdict(
    submission: Submission, outcome: VerdictOutcome, *, reason: ReviewReason | None = None, action: Action | None = None
) -> Verdict:
    """The end of a submission that nothing was asked about: overtaken, or holding up all others."""
    now = datetime.now(UTC)
    submitted_at = submission.submitted_at or now
    waited_ms = max(0, round((now - submitted_at).total_seconds() * 1000))
    return Verdict(
        verdict_id=verdict_id(
            submission_id=submission.id,
            uri=submission.uri,
            object_version=submission.version_id or submission.etag or "",
            policy_digest="",
            model_revision="",
        ),
        submission_id=submission.id,
        uri=submission.uri,
        version_id=submission.version_id,
        etag=submission.etag,
        sha256=None,
        tenant=submission.tenant,
        outcome=outcome,
        reason=reason,
        rating=None,
        category=None,
        rationale=None,
        score=None,
        action=action,
        policy=None,
        model=None,
        effort=None,
        source=None,
        image=None,
        timings_ms=Timings(queued=waited_ms, total=waited_ms),
        metadata=submission.metadata,
        submitted_at=submitted_at,
        judged_at=now,
    )


def build_verdict(
    submission: Submission,
    stored: StoredObject,
    image: PreparedImage,
    policy: Policy,
    answer: PolicyAssessment,
    clock: _Clock,
) -> Verdict:
    said = answer.said
    assessment = said if isinstance(said, Assessment) else None
    calibration = assessment.calibration if assessment else None
    judged_at = datetime.now(UTC)
    return Verdict(
        verdict_id=verdict_id(
            submission_id=submission.id,
            uri=submission.uri,
            object_version=stored.version_id or stored.etag or image.sha256,
            policy_digest=policy.identity.digest,
            model_revision=said.model.revision if said.model else "",
            calibration=calibration.digest if calibration else None,
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
        category=assessment.category if assessment and answer.detail == "verdict" else None,
        rationale=assessment.rationale if assessment else None,
        score=assessment.score if assessment else None,
        action=decide(assessment, policy) if assessment else "review",
        policy=policy.identity,
        model=said.model,
        calibration=calibration,
        effort=answer.effort,
        image=image.facts,
        timings_ms=clock.finish(judged_at),
        metadata=submission.metadata,
        submitted_at=clock.submitted_at,
        judged_at=judged_at,
    )
