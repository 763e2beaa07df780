"""Moderates one submission: the order of all steps from the submission to its verdict.

    choose the policy ► fetch ► judge the bytes (cascade.py) ► decide and build the verdict (verdicts.py)
                                                          ► apply the circuit breaker

The stream worker and the gateway both use it; each passes its own ports (ports.py).
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from services.core import telemetry
from services.core.errors import GuardFailed, Malformed, ObjectOutOfScope
from services.core.messages import ImageRequest, Verdict
from services.core.tenancy import Scope
from services.core.tenant_context import work_for_tenant
from services.core.values import Detail, GuardPriority, Policy, StoredObject
from services.moderation.cascade import judge_image
from services.moderation.ports import CircuitBreakerPort, GuardClient, ImagePreparer, ImageSource, PolicySource
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import VerdictSubject, build_verdicts


@dataclass(frozen=True, slots=True)
class ModerationResult:
    """The verdict of one submission, and the verdict of the shadow version, if there is one."""

    verdict: Verdict
    shadow: Verdict | None = None


class Moderator:
    """Judges submissions. With retrying ports, it waits while a backend is unavailable, until the caller cancels."""

    def __init__(
        self,
        *,
        policies: PolicySource,
        images: ImageSource,
        preparer: ImagePreparer,
        guard: GuardClient,
        breaker: CircuitBreakerPort | None = None,
    ) -> None:
        self._policies = policies
        self._images = images
        self._preparer = preparer
        self._guard = guard
        self._breaker = breaker

    async def judge(
        self,
        request: ImageRequest,
        scope: Scope,
        *,
        upload: StoredObject | None = None,
        priority: GuardPriority | None = None,
        detail: Detail = "verdict",
    ) -> ModerationResult:
        """Judge one image by the policy version that it names, else by the canary or the active version.

        `scope` says which objects and policies the request may use; no store is asked for others. `upload` is the
        image, if it came with the request; then nothing is fetched. `priority` is by default that of
        the request. With detail `score`, the guard gives no category and no rationale.

        Raises:
            Unjudgeable: the image can never be judged. The class of the error is the reason.
        """
        started_at = datetime.now(UTC)
        choice = await self._policies.choose(request, scope)
        if upload is None:
            _require_object_in_scope(request, scope)
        policies = [choice.policy] if choice.shadow is None else [choice.policy, choice.shadow]
        verdict, *others = await self.judge_under(
            request, policies, started_at, upload=upload, priority=priority, detail=detail
        )
        if isinstance(verdict, GuardFailed):
            raise verdict
        shadow = _compare_shadow(verdict, choice.shadow, others[0]) if choice.shadow else None
        # A caller of the gateway chooses images, ids and policies freely, so its requests must not open the breaker.
        counted_tenant = None if priority == "interactive" else choice.counted_tenant
        return ModerationResult(self._apply_circuit_breaker(verdict, choice.policy, counted_tenant), shadow)

    async def is_current_version(self, request: ImageRequest) -> bool:
        """Whether the object version of a request is the present one of its key.

        Raises:
            Unjudgeable: there is no such object, or the store denies access to it.
        """
        return request.reference is not None and await self._images.is_current_version(request.reference)

    async def judge_under(
        self,
        request: ImageRequest,
        policies: Sequence[Policy],
        started_at: datetime | None = None,
        *,
        upload: StoredObject | None = None,
        priority: GuardPriority | None = None,
        detail: Detail = "verdict",
    ) -> list[Verdict | GuardFailed]:
        """Judge one image under each of these policies, in order. The other arguments are those of `judge`.

        This neither applies the circuit breaker nor counts metrics of actions.

        Raises:
            Unjudgeable: the image cannot be fetched or decoded.
        """
        timer = StepTimer(request.submitted_at or datetime.now(UTC), started_at or datetime.now(UTC))
        async with AsyncExitStack() as resources:
            resources.enter_context(work_for_tenant(request.tenant))
            stored = upload
            if stored is None:
                if request.reference is None:
                    raise Malformed(
                        f"{request.uri} is not in a bucket; the image must come with the request", request.id
                    )
                stored = await timer.time("fetch", resources.enter_async_context(self._images.open(request.reference)))
            judged = await judge_image(
                stored.data,
                policies,
                priority=priority or request.priority,
                guard=self._guard,
                preparer=self._preparer,
                timer=timer,
                detail=detail,
            )
        return build_verdicts(VerdictSubject.from_request(request), stored, policies, judged, timer)

    def _apply_circuit_breaker(self, verdict: Verdict, policy: Policy, tenant: str | None) -> Verdict:
        """Count the action and return the verdict. A block becomes a review if the circuit breaker is open."""
        identity, action = policy.identity, verdict.action
        if (
            self._breaker
            and action
            and verdict.outcome == "verdict"
            and not self._breaker.count_and_allow(policy, action, tenant)
        ):
            # `quota` is the name on the wire for an open circuit breaker.
            verdict = verdict.model_copy(update={"outcome": "needs_review", "reason": "quota", "action": "review"})
        telemetry.ACTIONS.inc(
            1, {"policy": identity.name, "version": str(identity.version), "action": verdict.action or ""}
        )
        return verdict


def _require_object_in_scope(request: ImageRequest, scope: Scope) -> None:
    """
    Raises:
        ObjectOutOfScope: the request may not use the object.
    """
    if not scope.limits or (reference := request.reference) is None:
        return
    if not scope.allows_object(reference.bucket, reference.key):
        raise ObjectOutOfScope(
            f"the tenant {request.tenant!r} may not use {reference.uri}, which is below none of its prefixes; correct "
            "the submission's tenant or SLUICE_TENANT_PREFIXES"
        )


def _compare_shadow(verdict: Verdict, shadow: Policy, other: Verdict | GuardFailed) -> Verdict | None:
    """Return the shadow's verdict, if it has one. Count whether its action differs from the verdict's."""
    result = "failed"
    if isinstance(other, Verdict):
        result = "same" if other.action == verdict.action else "differs"
    identity = shadow.identity
    telemetry.SHADOWS.inc(1, {"policy": identity.name, "version": str(identity.version), "result": result})
    return other if isinstance(other, Verdict) else None
