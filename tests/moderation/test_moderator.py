"""The path of one image: what the thresholds make of it, several policies at once, and what a breaker changes."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import GuardFailed, Malformed, Unavailable, UnreadableAnswer
from services.core.messages import ImageRequest, ObjectReference, Submission, Upload
from services.core.values import (
    CATEGORIES,
    NO_CATEGORY,
    Action,
    Assessment,
    Detail,
    GuardPriority,
    ImageFacts,
    Policy,
    PolicyChoice,
    PreparedImage,
    StoredObject,
)
from services.moderation.cascade import PolicyAssessment, judge_image
from services.moderation.moderator import Moderator
from services.moderation.retrying import build_retrying_moderator
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import decide
from services.policies.document import PolicyDocument
from tests.support.fake_guard import MODEL

POLICY = PolicyDocument.model_validate(
    {"name": "p", "thresholds": {"review": 0.4, "block": 0.8, "categories": {"O7": {"review": 0.1, "block": 0.2}}}}
).as_version(1)
OTHER = PolicyDocument.model_validate({"name": "p", "description": "other"}).as_version(2)
ADAPTIVE = PolicyDocument.model_validate({"name": "p", "effort": "adaptive"}).as_version(3)

SUBMISSION = Submission(id="upl-1", uri="s3://uploads/a")


def unsafe(score: float = 0.9) -> Assessment:
    return Assessment(rating="Unsafe", category=CATEGORIES[1], rationale="r", score=score, model=MODEL)


def safe(score: float = 0.02) -> Assessment:
    return Assessment(rating="Safe", category=NO_CATEGORY, rationale=None, score=score, model=MODEL)


class Parts:
    """Everything that a moderation needs, in memory; the guard says `says[version]`, or raises it."""

    def __init__(self, policy: Policy, shadow: Policy | None = None) -> None:
        self.choice = PolicyChoice(policy, shadow)
        self.says: dict[int, Assessment | Exception] = {1: unsafe(), 2: safe(), 3: unsafe()}
        self.looks: list[Assessment | Exception] = []
        self.calls: list[tuple[list[int], Detail]] = []
        self.priorities: list[GuardPriority] = []
        self.admitted: list[Action] = []
        self.open = False

    async def choose(self, _request: ImageRequest) -> PolicyChoice:
        return self.choice

    @asynccontextmanager
    async def _stored(self) -> AsyncIterator[StoredObject]:
        yield StoredObject(b"bytes", None, "etag")

    def __call__(self) -> Moderator:
        return Moderator(policies=self, images=_Images(self), preparer=_Preparer(), guard=self, breaker=self)

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        self.priorities.append(priority)
        self.calls.append(([policy.identity.version for policy in policies], detail))
        answers = self.looks if detail == "score" else [self.says[policy.identity.version] for policy in policies]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, Assessment)]

    def allows(self, _policy: Policy, action: Action) -> bool:
        self.admitted.append(action)
        return not (self.open and action == "block")


class _Images:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def open(self, _reference: ObjectReference):  # type: ignore[no-untyped-def]
        return self._parts._stored()


class _NoImages:
    def open(self, reference: ObjectReference) -> NoReturn:
        raise AssertionError(f"{reference} was fetched")


class _Preparer:
    async def prepare(self, data: bytes) -> PreparedImage:
        return PreparedImage(data, "image/jpeg", 8, 8, "0", ImageFacts(width=8, height=8, format="jpeg"))

    async def first_look(self, image: PreparedImage) -> PreparedImage:
        return image


@given(st.floats(0, 1), st.sampled_from([*CATEGORIES, NO_CATEGORY]))
def test_decide(score: float, category: str) -> None:
    assessment = Assessment(rating="Safe", category=category, rationale=None, score=score, model=MODEL)
    review, block = (0.1, 0.2) if category.startswith("O7") else (0.4, 0.8)
    expected = "block" if score >= block else "review" if score >= review else "allow"
    assert decide(assessment, POLICY) == expected


async def test_a_shadow_is_judged_in_the_same_call_and_never_counted() -> None:
    parts = Parts(POLICY, OTHER)
    result = await parts().judge(SUBMISSION)
    assert parts.calls == [([1, 2], "verdict")], "one call: the second policy finds the image in the engine's cache"
    assert (result.verdict.action, result.verdict.policy) == ("block", POLICY.identity)
    assert result.shadow is not None
    assert (result.shadow.action, result.shadow.policy) == ("allow", OTHER.identity)
    assert result.shadow.verdict_id != result.verdict.verdict_id
    assert parts.admitted == ["block"]


@pytest.mark.parametrize("error", [GuardFailed("refused"), UnreadableAnswer("garbage", MODEL)])
async def test_a_shadow_that_cannot_be_judged_harms_nobody(error: Exception) -> None:
    parts = Parts(POLICY, OTHER)
    parts.says[2] = error
    result = await parts().judge(SUBMISSION)
    assert result.verdict.action == "block"
    if isinstance(error, GuardFailed):
        assert result.shadow is None
    else:
        assert result.shadow is not None
        assert result.shadow.outcome == "needs_review"


async def test_an_image_that_the_engine_refuses() -> None:
    parts = Parts(POLICY, OTHER)
    parts.says[1] = GuardFailed("refused")
    with pytest.raises(GuardFailed):
        await parts().judge(SUBMISSION)


async def test_an_answer_that_is_read_the_second_time() -> None:
    parts = Parts(POLICY)
    parts.says[1] = UnreadableAnswer("garbage", MODEL)
    verdict = (await parts().judge(SUBMISSION)).verdict
    assert len(parts.calls) == 2
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "unreadable_answer", "review")
    assert parts.admitted == [], "it says nothing about the policy"


@pytest.mark.parametrize(
    ("looks", "effort"),
    [
        ([safe(0.02)], "first_look"),
        ([safe(0.3)], "full"),
        ([UnreadableAnswer("no score")], "full"),
        ([GuardFailed("too small")], "full"),
    ],
)
async def test_a_first_look_decides_or_is_followed_by_a_full_one(
    looks: list[Assessment | Exception], effort: str
) -> None:
    parts = Parts(ADAPTIVE)
    parts.looks = looks
    verdict = (await parts().judge(SUBMISSION)).verdict
    assert verdict.effort == effort
    assert verdict.action == ("allow" if effort == "first_look" else "block")


async def test_an_image_that_a_first_look_calls_unsafe_is_judged_in_full_however_low_its_score() -> None:
    document = {"name": "p", "effort": "adaptive", "first_look_below": 0.9}
    parts = Parts(PolicyDocument.model_validate(document).as_version(3))
    parts.looks = [Assessment(rating="Unsafe", category=NO_CATEGORY, rationale=None, score=0.6, model=MODEL)]
    verdict = (await parts().judge(SUBMISSION)).verdict
    assert (verdict.effort, verdict.rating) == ("full", "Unsafe")
    assert verdict.category != NO_CATEGORY
    assert verdict.rationale


async def test_where_the_breaker_is_open_a_block_becomes_a_review() -> None:
    parts = Parts(POLICY)
    parts.open = True
    verdict = (await parts().judge(SUBMISSION)).verdict
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "quota", "review")
    assert (verdict.rating, verdict.score) == ("Unsafe", 0.9), "what the guard said is kept"
    parts.says[1] = safe()
    assert (await parts().judge(SUBMISSION)).verdict.outcome == "verdict"


async def test_judge_of_an_upload_without_bytes_is_malformed() -> None:
    with pytest.raises(Malformed, match="has to come with the request"):
        await Parts(POLICY)().judge(Upload(id="a", uri=Upload.uri_of(b"bytes")))


async def test_each_port_that_is_unavailable_once_is_asked_again() -> None:
    parts = Parts(ADAPTIVE)
    parts.looks = [safe(0.3)]
    flaky = _UnavailableOnce(parts)
    moderator = build_retrying_moderator(policies=flaky, images=flaky, preparer=flaky, guard=flaky)
    assert (await moderator.judge(SUBMISSION)).verdict.effort == "full"
    assert flaky.calls == ["choose"] * 2 + ["open"] * 2 + ["prepare"] * 2 + ["first_look"] * 2 + ["assess_each"] * 3


class _UnavailableOnce:
    """Each method of each port fails the first time."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.calls: list[str] = []

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if self.calls.count(name) == 1:
            raise Unavailable(f"{name} is away")

    async def choose(self, request: ImageRequest) -> PolicyChoice:
        self._count("choose")
        return await self._parts.choose(request)

    @asynccontextmanager
    async def open(self, _reference: ObjectReference) -> AsyncIterator[StoredObject]:
        self._count("open")
        async with self._parts._stored() as stored:
            yield stored

    async def prepare(self, data: bytes) -> PreparedImage:
        self._count("prepare")
        return await _Preparer().prepare(data)

    async def first_look(self, image: PreparedImage) -> PreparedImage:
        self._count("first_look")
        return image

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        self._count("assess_each")
        return await self._parts.assess_each(image, policies, detail, priority)


async def test_judge_image_returns_one_result_for_each_policy() -> None:
    parts = Parts(POLICY)
    parts.says[2] = GuardFailed("refused")
    timer = StepTimer.start()
    judged = await judge_image(
        b"bytes", [POLICY, OTHER], priority="backfill", guard=parts, preparer=_Preparer(), timer=timer
    )
    first, second = judged.results
    assert isinstance(first, PolicyAssessment)
    assert (first.answer, first.effort, second) == (unsafe(), "full", parts.says[2])
    assert judged.image.data == b"bytes"
    assert timer.ms.keys() == {"prepare", "guard"}


async def test_an_upload_is_not_fetched_and_takes_the_turn_that_it_is_given() -> None:
    parts = Parts(POLICY)
    moderator = Moderator(policies=parts, images=_NoImages(), preparer=_Preparer(), guard=parts)
    upload = Upload(id="a", uri=Upload.uri_of(b"bytes"))
    result = await moderator.judge(upload, upload=StoredObject(b"bytes", None, None), priority="interactive")
    verdict = result.verdict
    assert verdict.uri == f"upload:sha256:{hashlib.sha256(b'bytes').hexdigest()}"
    assert (verdict.action, verdict.etag, verdict.version_id) == ("block", None, None)
    assert parts.priorities == ["interactive"]
    with pytest.raises(Malformed):
        Submission.parse({"id": "a", "uri": upload.uri})  # nothing that could be fetched from a stream


@pytest.mark.parametrize(("policy", "calls"), [(POLICY, ["score"]), (ADAPTIVE, ["score", "score"])])
async def test_a_score_alone_has_no_category(policy: Policy, calls: list[Detail]) -> None:
    parts = Parts(policy)
    parts.looks = [Assessment(rating="Unsafe", category=NO_CATEGORY, rationale=None, score=0.9, model=MODEL)]
    verdict = (await parts().judge(SUBMISSION, detail="score")).verdict
    assert [detail for _, detail in parts.calls] == calls
    assert (verdict.rating, verdict.score, verdict.action) == ("Unsafe", 0.9, "block")
    assert (verdict.category, verdict.rationale) == (None, None)


async def test_a_trial_counts_nothing_and_says_what_each_policy_makes_of_it() -> None:
    parts = Parts(POLICY)
    first, second = await parts().judge_under(SUBMISSION, [POLICY, OTHER])
    assert not isinstance(first, GuardFailed)
    assert not isinstance(second, GuardFailed)
    assert (first.action, second.action) == ("block", "allow")
    assert parts.admitted == []
