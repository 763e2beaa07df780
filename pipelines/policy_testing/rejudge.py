"""`sluice replay`: judges the image of a verdict again, by the same policy version, and compares the verdicts."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

from pydantic import ValidationError

from pipelines.clients.judge_client import JudgeRequest, open_client
from pipelines.clients.streams import format_verdict
from services.core.errors import ConfigurationError, SluiceError, UnknownPolicy
from services.core.messages import Submission, Verdict
from services.core.settings import Settings
from services.core.values import Policy, PolicyIdentity
from services.policies.document import PolicyDocument
from services.policies.registry import PolicyRegistry
from services.streams.config import StreamConfig
from services.streams.factory import open_reader

SCORE_TOLERANCE: Final = 1e-3
"""Engines sum in another order in each batch, which changes the last digits of a score."""

Value = str | float | None


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field that differs between the two verdicts."""

    field: str
    before: Value
    after: Value

    def __str__(self) -> str:
        return f"{self.field}: was {_display(self.before)}, is {_display(self.after)}"


@dataclass(frozen=True, slots=True)
class RejudgedVerdict:
    """A verdict, and the new verdict on the same image."""

    before: Verdict
    after: Verdict
    differences: tuple[FieldDifference, ...]
    notes: tuple[str, ...]
    """Sentences that help to read the differences."""

    @property
    def reproduced(self) -> bool:
        """Whether no field differs."""
        return not self.differences

    def lines(self) -> list[str]:
        """For people: the differences, or the verdict if there are none."""
        return [str(each) for each in self.differences] or [format_verdict(self.after)]

    def to_json(self) -> str:
        """One JSON object: the differences, and both verdicts."""
        found = {
            "verdict_id": self.before.verdict_id,
            "reproduced": self.reproduced,
            "differences": [asdict(difference) for difference in self.differences],
            "notes": self.notes,
        }
        verdicts = {"before": self.before.model_dump(mode="json"), "after": self.after.model_dump(mode="json")}
        return json.dumps(found | verdicts)


async def find_verdict(verdict_id: str, settings: Settings) -> Verdict:
    """The newest verdict with that id on the stream.

    Raises:
        ConfigurationError: the stream has no such verdict.
        StreamUnavailable: the stream does not answer.
    """
    reader = await open_reader(StreamConfig.from_settings(settings))
    wanted, found = verdict_id.encode(), None
    try:
        async for message in reader.read(settings.verdicts_stream, follow=False):
            if wanted in message.value:
                with suppress(ValidationError):  # other programs may write to that stream
                    verdict = Verdict.model_validate_json(message.value)
                    found = verdict if verdict.verdict_id == verdict_id else found
    finally:
        await reader.close()
    if found is None:
        raise ConfigurationError(
            f"there is no verdict {verdict_id} on {settings.verdicts_stream}; `sluice verdicts --json` shows the "
            "verdicts that the stream still has"
        )
    return found


def rejudge(before: Verdict, settings: Settings, progress: Callable[[str], None]) -> RejudgedVerdict:
    """Judge the same object version by the same policy version again. Nothing is published.

    Raises:
        ConfigurationError: no service runs.
        UnknownPolicy: the policy bucket does not have the policy version or the calibration of the verdict.
        SluiceError: the verdict has no answer of the guard, or the object cannot be judged any more.
    """
    if before.policy is None or before.outcome == "superseded":
        raise SluiceError(
            f"verdict {before.verdict_id} is {before.outcome}: a newer version of the object arrived before it was "
            "judged, so there is nothing to judge again"
            if before.outcome == "superseded"
            else f"verdict {before.verdict_id} has no policy, so its image was not judged and cannot be judged again"
        )
    submission = Submission(
        id=before.submission_id,
        uri=before.uri,
        version_id=before.version_id,
        etag=before.etag,
        tenant=before.tenant,
    )
    policy = _load_policy(before, before.policy, PolicyRegistry.from_settings(settings))
    with open_client(settings) as service:
        (result,) = service.judge([JudgeRequest(submission, (policy,))], progress)
    answer = result[0] if isinstance(result, list) else result
    if not isinstance(answer, Verdict):
        raise SluiceError(f"verdict {before.verdict_id} cannot be replayed ({answer.reason}): {answer}")
    if answer.sha256 != before.sha256:
        raise SluiceError(
            f"verdict {before.verdict_id} cannot be replayed (changed): the object {before.uri} has changed, and the "
            "verdict has no version or ETag of the former object"
        )
    return RejudgedVerdict(before, answer, tuple(compare(before, answer)), tuple(explain(before, answer)))


def _load_policy(before: Verdict, identity: PolicyIdentity, registry: PolicyRegistry) -> Policy:
    """The policy version with the calibration of the verdict, which may not be the one that is applied now."""
    stored = registry.get(identity.name, identity.version)
    if not isinstance(stored.document, PolicyDocument):
        raise UnknownPolicy(f"{identity.name}@{identity.version} is the tenants document, not a policy")
    policy = stored.document.as_version(identity.version)
    if before.calibration is None or before.model is None:
        return policy
    revision = before.model.revision
    fitted = registry.find_calibration(identity.name, identity.version, revision, before.calibration.digest)
    return dataclasses.replace(policy, calibrations={revision: fitted.map})


def compare(before: Verdict, after: Verdict) -> Sequence[FieldDifference]:
    """The differences in policy, model and answer. Ids, times and sizes are not compared.

    A verdict that the circuit breaker changed is compared as it was before.
    """
    then, now = _list_fields(_undo_breaker(before)), _list_fields(after)
    return [FieldDifference(field, then[field], now[field]) for field in then if not _is_same(then[field], now[field])]


def explain(before: Verdict, after: Verdict) -> list[str]:
    """Sentences that help to read the differences."""
    found = []
    if before.reason == "quota":
        found.append(
            "the circuit breaker of the policy version was open at the time and turned this block into a review; the "
            "comparison uses the guard's answer"
        )
    if (before.model and before.model.revision) != (after.model and after.model.revision):
        found.append("the service has another model than at the time, so the answer may differ")
    elif (before.model and before.model.engine) != (after.model and after.model.engine):
        found.append("the service has another engine than at the time, so scores may differ")
    return found


def _undo_breaker(verdict: Verdict) -> Verdict:
    # The breaker changes blocks into reviews, and nothing else.
    if verdict.reason != "quota":
        return verdict
    return verdict.model_copy(update={"outcome": "verdict", "reason": None, "action": "block"})


def _list_fields(verdict: Verdict) -> dict[str, Value]:
    policy, model = verdict.policy, verdict.model
    return {
        "sha256": verdict.sha256,
        "policy.digest": policy.digest if policy else None,
        "model.name": model.name if model else None,
        "model.revision": model.revision if model else None,
        "model.engine": model.engine if model else None,
        "model.prompt": model.prompt if model else None,
        "calibration.digest": verdict.calibration.digest if verdict.calibration else None,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "rating": verdict.rating,
        "category": verdict.category,
        "rationale": verdict.rationale,
        "score": verdict.score,
        "action": verdict.action,
        "effort": verdict.effort,
    }


def _is_same(one: Value, other: Value) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0, abs_tol=SCORE_TOLERANCE)
    return one == other


def _display(value: Value) -> str:
    return "nothing" if value is None else f"{value:.4f}" if isinstance(value, float) else value
