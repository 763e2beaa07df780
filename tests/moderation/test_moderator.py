"""The moderator: thresholds, shadow versions, first looks, circuit breaker, retries and uploads."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import GuardFailed, Malformed, Unavailable, UnreadableAnswer
from services.core.messages import ImageRequest, ObjectReference, Submission, Upload
from services.core.tenancy import UNLIMITED, Scope
from services.core.values import (
    CATEGORIES,
    NO_CATEGORY,
    Assessment,
    Detail,
    GuardPriority,
    Policy,
    PolicyChoice,
    PreparedImage,
    StoredObject,
)
from services.moderation.cascade import PolicyAssessment, judge_image
from services.moderation.moderator import Moderator
from services.moderation.retrying_ports import build_retrying_moderator
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import decide
from services.policies.document import PolicyDocument
from tests.support.fake_guard import MODEL
from tests.support.fake_ports import POLICY, FakePorts, FakePreparer, safe, unsafe

OTHER = PolicyDocument.model_validate({"name": "p", "description": "other"}).as_version(2)
ADAPTIVE = PolicyDocument.model_validate({"name": "p", "effort": "adaptive"}).as_version(3)

SUBMISSION = Submission(id="upl-1", uri="s3://uploads/a")


class _NoImages:
    """No object may be fetched."""

    def open(self, reference: ObjectReference) -> NoReturn:
        raise AssertionError(f"{reference} was fetched")


@given(st.floats(0, 1), st.sampled_from([*CATEGORIES, NO_CATEGORY]))
def test_decide_returns_the_action_of_the_category_thresholds(score: float, category: str) -> None:
    assessment = Assessment(rating="Safe", category=category, rationale=None, score=score, model=MODEL)
    review, block = (0.1, 0.2) if category.startswith("O7") else (0.4, 0.8)
    expected = "block" if score >= block else "review" if score >= review else "allow"
    assert decide(assessment.score, assessment.category, POLICY) == expected


async def test_shadow_is_judged_in_the_same_call_and_not_counted() -> None:
    ports = FakePorts(POLICY, OTHER)
    result = await ports.build_moderator().judge(SUBMISSION, UNLIMITED)
    assert ports.calls == [([1, 2], "verdict")], "one call, so that the engine reads the image once"
    assert (result.verdict.action, result.verdict.policy) == ("block", POLICY.identity)
    assert result.shadow is not None
    assert (result.shadow.action, result.shadow.policy) == ("allow", OTHER.identity)
    assert result.shadow.verdict_id != result.verdict.verdict_id
    assert ports.counted_actions == ["block"]


@pytest.mark.parametrize("error", [GuardFailed("refused"), UnreadableAnswer("garbage", MODEL)])
async def test_shadow_with_an_error_does_not_change_the_verdict(error: Exception) -> None:
    ports = FakePorts(POLICY, OTHER)
    ports.answers[2] = error
    result = await ports.build_moderator().judge(SUBMISSION, UNLIMITED)
    assert result.verdict.action == "block"
    if isinstance(error, GuardFailed):
        assert result.shadow is None
    else:
        assert result.shadow is not None
        assert result.shadow.outcome == "needs_review"


async def test_image_refused_by_the_engine_raises_guard_failed() -> None:
    ports = FakePorts(POLICY, OTHER)
    ports.answers[1] = GuardFailed("refused")
    with pytest.raises(GuardFailed):
        await ports.build_moderator().judge(SUBMISSION, UNLIMITED)


async def test_answer_unreadable_twice_needs_review() -> None:
    ports = FakePorts(POLICY)
    ports.answers[1] = UnreadableAnswer("garbage", MODEL)
    verdict = (await ports.build_moderator().judge(SUBMISSION, UNLIMITED)).verdict
    assert len(ports.calls) == 2
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "unreadable_answer", "review")
    assert ports.counted_actions == [], "an unreadable answer says nothing about the policy"


@pytest.mark.parametrize(
    ("first_look_answers", "effort"),
    [
        ([safe(0.02)], "first_look"),
        ([safe(0.3)], "full"),
        ([UnreadableAnswer("no score")], "full"),
        ([GuardFailed("too small")], "full"),
    ],
)
async def test_first_look_accepts_a_low_score_and_escalates_others(
    first_look_answers: list[Assessment | Exception], effort: str
) -> None:
    ports = FakePorts(ADAPTIVE)
    ports.first_look_answers = first_look_answers
    verdict = (await ports.build_moderator().judge(SUBMISSION, UNLIMITED)).verdict
    assert verdict.effort == effort
    assert verdict.action == ("allow" if effort == "first_look" else "block")


async def test_image_rated_unsafe_by_the_first_look_is_assessed_in_full() -> None:
    document = {"name": "p", "effort": "adaptive", "first_look_below": 0.9}
    ports = FakePorts(PolicyDocument.model_validate(document).as_version(3))
    ports.first_look_answers = [
        Assessment(rating="Unsafe", category=NO_CATEGORY, rationale=None, score=0.6, model=MODEL)
    ]
    verdict = (await ports.build_moderator().judge(SUBMISSION, UNLIMITED)).verdict
    assert (verdict.effort, verdict.rating) == ("full", "Unsafe")
    assert verdict.category != NO_CATEGORY
    assert verdict.rationale


async def test_block_with_an_open_breaker_becomes_a_review() -> None:
    ports = FakePorts(POLICY)
    ports.is_breaker_open = True
    verdict = (await ports.build_moderator().judge(SUBMISSION, UNLIMITED)).verdict
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "quota", "review")
    assert (verdict.rating, verdict.score) == ("Unsafe", 0.9), "the guard's assessment is kept"
    ports.answers[1] = safe()
    assert (await ports.build_moderator().judge(SUBMISSION, UNLIMITED)).verdict.outcome == "verdict"


async def test_upload_without_bytes_is_malformed() -> None:
    with pytest.raises(Malformed, match="must come with the request"):
        await FakePorts(POLICY).build_moderator().judge(Upload(id="a", uri=Upload.make_uri(b"bytes")), UNLIMITED)


async def test_unavailable_port_is_called_again() -> None:
    ports = FakePorts(ADAPTIVE)
    ports.first_look_answers = [safe(0.3)]
    flaky = _UnavailableOnce(ports)
    moderator = build_retrying_moderator(policies=flaky, images=flaky, preparer=flaky, guard=flaky)
    assert (await moderator.judge(SUBMISSION, UNLIMITED)).verdict.effort == "full"
    assert flaky.calls == ["choose"] * 2 + ["open"] * 2 + ["prepare"] * 2 + ["first_look"] * 2 + ["assess_each"] * 3


class _UnavailableOnce:
    """The first call of each method of each port fails."""

    def __init__(self, ports: FakePorts) -> None:
        self._ports = ports
        self.calls: list[str] = []

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if self.calls.count(name) == 1:
            raise Unavailable(f"{name} is unavailable")

    async def choose(self, request: ImageRequest, scope: Scope) -> PolicyChoice:
        self._count("choose")
        return await self._ports.choose(request, scope)

    @asynccontextmanager
    async def open(self, _reference: ObjectReference) -> AsyncIterator[StoredObject]:
        self._count("open")
        async with self._ports.open_object() as stored:
            yield stored

    async def prepare(self, data: bytes) -> PreparedImage:
        self._count("prepare")
        return await FakePreparer().prepare(data)

    async def prepare_first_look(self, image: PreparedImage) -> PreparedImage:
        self._count("first_look")
        return image

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        self._count("assess_each")
        return await self._ports.assess_each(image, policies, detail, priority)


async def test_judge_image_returns_one_result_for_each_policy() -> None:
    ports = FakePorts(POLICY)
    ports.answers[2] = GuardFailed("refused")
    timer = StepTimer.start()
    judged = await judge_image(
        b"bytes", [POLICY, OTHER], priority="backfill", guard=ports, preparer=FakePreparer(), timer=timer
    )
    first, second = judged.results
    assert isinstance(first, PolicyAssessment)
    assert (first.answer, first.effort, second) == (unsafe(), "full", ports.answers[2])
    assert judged.image.data == b"bytes"
    assert timer.ms.keys() == {"prepare", "guard"}


async def test_upload_is_not_fetched_and_has_the_given_priority() -> None:
    ports = FakePorts(POLICY)
    moderator = Moderator(policies=ports, images=_NoImages(), preparer=FakePreparer(), guard=ports)
    upload = Upload(id="a", uri=Upload.make_uri(b"bytes"))
    result = await moderator.judge(upload, UNLIMITED, upload=StoredObject(b"bytes", None, None), priority="interactive")
    verdict = result.verdict
    assert verdict.uri == f"upload:sha256:{hashlib.sha256(b'bytes').hexdigest()}"
    assert (verdict.action, verdict.etag, verdict.version_id) == ("block", None, None)
    assert ports.priorities == ["interactive"]
    with pytest.raises(Malformed):
        Submission.parse({"id": "a", "uri": upload.uri})  # an upload's URI on a stream names no object


@pytest.mark.parametrize(("policy", "calls"), [(POLICY, ["score"]), (ADAPTIVE, ["score", "score"])])
async def test_verdict_with_detail_score_has_no_category(policy: Policy, calls: list[Detail]) -> None:
    ports = FakePorts(policy)
    ports.first_look_answers = [
        Assessment(rating="Unsafe", category=NO_CATEGORY, rationale=None, score=0.9, model=MODEL)
    ]
    verdict = (await ports.build_moderator().judge(SUBMISSION, UNLIMITED, detail="score")).verdict
    assert [detail for _, detail in ports.calls] == calls
    assert (verdict.rating, verdict.score, verdict.action) == ("Unsafe", 0.9, "block")
    assert (verdict.category, verdict.rationale) == (None, None)


async def test_judge_under_returns_a_verdict_for_each_policy_and_counts_no_action() -> None:
    ports = FakePorts(POLICY)
    first, second = await ports.build_moderator().judge_under(SUBMISSION, [POLICY, OTHER])
    assert not isinstance(first, GuardFailed)
    assert not isinstance(second, GuardFailed)
    assert (first.action, second.action) == ("block", "allow")
    assert ports.counted_actions == []


@pytest.mark.parametrize(("priority", "counted"), [(None, "shop"), ("backfill", "shop"), ("interactive", None)])
async def test_interactive_verdict_is_not_counted_by_the_circuit_breaker(
    priority: GuardPriority | None, counted: str | None
) -> None:
    ports = FakePorts(POLICY)
    ports.choice = PolicyChoice(POLICY, counted_tenant="shop")
    await ports.build_moderator().judge(SUBMISSION, UNLIMITED, priority=priority)
    assert ports.counted_tenants == [counted]
