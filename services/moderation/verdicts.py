"""Builds verdicts from assessments and a policy's thresholds, and verdicts for submissions that are not judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from services.core.errors import GuardFailed
from services.core.messages import ImageRequest, Timings, Verdict, make_verdict_id
from services.core.values import Action, Assessment, Policy, PreparedImage, ReviewReason, StoredObject, VerdictOutcome
from services.moderation.cascade import JudgedImage, PolicyAssessment
from services.moderation.step_timer import StepTimer


@dataclass(frozen=True, slots=True)
class VerdictSubject:
    """The fields of a verdict that come from the submission."""

    submission_id: str
    uri: str
    tenant: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_request(cls, request: ImageRequest) -> "VerdictSubject":
        """Take the fields from a request."""
        return cls(request.id, request.uri, request.tenant, request.metadata)


def decide(score: float, category: str, policy: Policy) -> Action:
    """Return the action that the policy's thresholds give for the calibrated score and the category of an image."""
    thresholds = policy.category_thresholds.get(category, policy.thresholds)
    if score >= thresholds.block:
        return "block"
    return "review" if score >= thresholds.review else "allow"


def build_skipped_verdict(
    submission: ImageRequest,
    outcome: VerdictOutcome,
    *,
    reason: ReviewReason | None = None,
    action: Action | None = None,
) -> Verdict:
    """Build the verdict of a submission that the guard never gets.

    A newer event replaced the submission, or the submission held up its partition.
    """
    now = datetime.now(UTC)
    submitted_at = submission.submitted_at or now
    waited_ms = max(0, round((now - submitted_at).total_seconds() * 1000))
    return Verdict(
        verdict_id=make_verdict_id(
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


def build_verdicts(
    subject: VerdictSubject, stored: StoredObject, policies: Sequence[Policy], judged: JudgedImage, timer: StepTimer
) -> list[Verdict | GuardFailed]:
    """Build the verdict under each policy, in order.

    If the engine refuses the image under a policy, the list has the error in place of that verdict.
    """
    return [
        result
        if isinstance(result, GuardFailed)
        else _build_verdict(subject, stored, judged.image, policy, result, timer)
        for policy, result in zip(policies, judged.results, strict=True)
    ]


def _build_verdict(
    subject: VerdictSubject,
    stored: StoredObject,
    image: PreparedImage,
    policy: Policy,
    assessed: PolicyAssessment,
    timer: StepTimer,
) -> Verdict:
    """Build the verdict for one assessed image, with `needs_review` if the guard's answer could not be parsed."""
    answer = assessed.answer
    assessment = answer if isinstance(answer, Assessment) else None
    calibration = assessment.calibration if assessment else None
    judged_at = datetime.now(UTC)
    return Verdict(
        verdict_id=make_verdict_id(
            submission_id=subject.submission_id,
            uri=subject.uri,
            object_version=stored.version_id or stored.etag or image.sha256,
            policy_digest=policy.identity.digest,
            model_revision=answer.model.revision if answer.model else "",
            calibration=calibration.digest if calibration else None,
        ),
        submission_id=subject.submission_id,
        uri=subject.uri,
        version_id=stored.version_id,
        etag=stored.etag,
        sha256=image.sha256,
        tenant=subject.tenant,
        outcome="verdict" if assessment else "needs_review",
        reason=None if assessment else "unreadable_answer",
        rating=assessment.rating if assessment else None,
        category=assessment.category if assessment and assessed.detail == "verdict" else None,
        rationale=assessment.rationale if assessment else None,
        score=assessment.score if assessment else None,
        action=decide(assessment.score, assessment.category, policy) if assessment else "review",
        policy=policy.identity,
        model=answer.model,
        calibration=calibration,
        effort=assessed.effort,
        image=image.facts,
        timings_ms=timer.finish(judged_at),
        metadata=dict(subject.metadata),
        submitted_at=timer.submitted_at,
        judged_at=judged_at,
    )
