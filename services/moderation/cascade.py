"""The cascade: assesses one image under each policy, in at most two stages.

With effort `adaptive`, the guard first gives only a score for a small copy of the image (the first look). If the rating
is Safe and the score is low, this is the assessment. Otherwise, and with effort `full`, the guard assesses the image
itself. This module takes bytes and policies; it does not use streams, requests or stores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.core import telemetry
from services.core.errors import GuardFailed, UnreadableAnswer
from services.core.values import AppliedCalibration, Assessment, Detail, Effort, GuardPriority, Policy, PreparedImage
from services.moderation.ports import GuardClient, ImagePreparer
from services.moderation.step_timer import StepTimer


@dataclass(frozen=True, slots=True)
class PolicyAssessment:
    """The guard's assessment under one policy, or the error if two answers could not be parsed.

    This error is a value, because it becomes a verdict for review. A refusal (GuardFailed) becomes a dead letter.
    """

    answer: Assessment | UnreadableAnswer
    effort: Effort
    detail: Detail = "verdict"


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """One image as the model saw it, with one result for each policy, in order."""

    image: PreparedImage
    results: list[PolicyAssessment | GuardFailed]


async def judge_image(
    data: bytes,
    policies: Sequence[Policy],
    *,
    priority: GuardPriority,
    guard: GuardClient,
    preparer: ImagePreparer,
    timer: StepTimer,
    detail: Detail = "verdict",
) -> JudgedImage:
    """Decode one image and assess it under each policy. `timer` records the steps `prepare` and `guard`.

    Raises:
        Unjudgeable: the bytes are not an image that can be decoded.
        Unavailable: no decoder or no engine is available; retrying ports (retrying_ports.py) wait instead.
    """
    image = await timer.time("prepare", preparer.prepare(data))
    assessing = assess_under_policies(image, policies, priority, guard=guard, preparer=preparer, detail=detail)
    return JudgedImage(image, await timer.time("guard", assessing))


async def assess_under_policies(
    image: PreparedImage,
    policies: Sequence[Policy],
    priority: GuardPriority,
    *,
    guard: GuardClient,
    preparer: ImagePreparer,
    detail: Detail = "verdict",
) -> list[PolicyAssessment | GuardFailed]:
    """Assess the image under each policy. Returns in their order the assessment, or the error if the engine refuses."""
    results: list[PolicyAssessment | GuardFailed | None] = [None] * len(policies)
    adaptive = [n for n, policy in enumerate(policies) if policy.effort == "adaptive"]
    if adaptive:
        looks = await _take_first_look(image, [policies[n] for n in adaptive], priority, guard=guard, preparer=preparer)
        for n, result in zip(adaptive, looks, strict=True):
            results[n] = result
    rest = [n for n, result in enumerate(results) if result is None]
    if rest:
        full = await _assess_in_full(image, [policies[n] for n in rest], priority, guard, detail)
        for n, outcome in zip(rest, full, strict=True):
            results[n] = outcome
    return [result for result in results if result is not None]


async def _take_first_look(
    image: PreparedImage,
    policies: Sequence[Policy],
    priority: GuardPriority,
    *,
    guard: GuardClient,
    preparer: ImagePreparer,
) -> list[PolicyAssessment | None]:
    """Assess a small copy of the image. Returns an assessment for each policy that accepts its low score, else None."""
    small = await preparer.prepare_first_look(image)
    try:
        assessments = await _call_guard(small, policies, "score", priority, guard)
    except (GuardFailed, UnreadableAnswer):
        return [None] * len(policies)  # the full assessment reports the error
    results = [
        PolicyAssessment(assessment, "first_look")
        if assessment.rating == "Safe" and assessment.score < policy.first_look_below
        else None
        for policy, assessment in zip(policies, assessments, strict=True)
    ]
    for result in results:
        telemetry.FIRST_LOOKS.inc(1, {"result": "accepted" if result else "escalated"})
    return results


async def _assess_in_full(
    image: PreparedImage,
    policies: Sequence[Policy],
    priority: GuardPriority,
    guard: GuardClient,
    detail: Detail,
    *,
    is_retry: bool = False,
) -> list[PolicyAssessment | GuardFailed]:
    """Assess under all policies in one call, so that the engine reads the image once.

    If the call fails, it is repeated once for each policy by itself. A refusal under a single policy is not retried.
    """
    try:
        assessments = await _call_guard(image, policies, detail, priority, guard)
        return [PolicyAssessment(assessment, "full", detail) for assessment in assessments]
    except GuardFailed as error:
        if len(policies) == 1:
            return [error]
    except UnreadableAnswer as error:
        if is_retry:
            return [PolicyAssessment(error, "full")]
    retries = [await _assess_in_full(image, [policy], priority, guard, detail, is_retry=True) for policy in policies]
    return [result for (result,) in retries]


async def _call_guard(
    image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority, guard: GuardClient
) -> list[Assessment]:
    """Return the guard's assessments with calibrated scores, because all thresholds are for calibrated scores."""
    assessments = await guard.assess_each(image, policies, detail, priority)
    return [apply_calibration(each, policy) for each, policy in zip(assessments, policies, strict=True)]


def apply_calibration(assessment: Assessment, policy: Policy) -> Assessment:
    """Return the assessment with a calibrated score, if the policy has a calibration for this checkpoint."""
    calibration = policy.calibrations.get(assessment.model.revision)
    if calibration is None:
        return assessment
    applied = AppliedCalibration(digest=calibration.digest, raw_score=assessment.score)
    return replace(assessment, score=calibration.probability(assessment.score), calibration=applied)
