"""The ports of a moderator, in memory."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from services.core.messages import ImageRequest, ObjectReference
from services.core.tenancy import Scope
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
from services.moderation.moderator import Moderator
from services.policies.document import PolicyDocument
from tests.support.fake_guard import MODEL

POLICY = PolicyDocument.model_validate(
    {"name": "p", "thresholds": {"review": 0.4, "block": 0.8, "categories": {"O7": {"review": 0.1, "block": 0.2}}}}
).as_version(1)


def unsafe(score: float = 0.9) -> Assessment:
    return Assessment(rating="Unsafe", category=CATEGORIES[1], rationale="r", score=score, model=MODEL)


def safe(score: float = 0.02) -> Assessment:
    return Assessment(rating="Safe", category=NO_CATEGORY, rationale=None, score=score, model=MODEL)


class FakePorts:
    """The ports of a moderator, in memory. The guard answers with `answers[version]`, or raises it."""

    def __init__(self, policy: Policy, shadow: Policy | None = None) -> None:
        self.choice = PolicyChoice(policy, shadow)
        self.answers: dict[int, Assessment | Exception] = {1: unsafe(), 2: safe(), 3: unsafe()}
        self.first_look_answers: list[Assessment | Exception] = []
        self.calls: list[tuple[list[int], Detail]] = []
        self.priorities: list[GuardPriority] = []
        self.counted_actions: list[Action] = []
        self.counted_tenants: list[str | None] = []
        self.is_breaker_open = False

    async def choose(self, _request: ImageRequest, _scope: Scope) -> PolicyChoice:
        return self.choice

    @asynccontextmanager
    async def open_object(self) -> AsyncIterator[StoredObject]:
        yield StoredObject(b"bytes", None, "etag")

    def build_moderator(self) -> Moderator:
        return Moderator(policies=self, images=_Images(self), preparer=FakePreparer(), guard=self, breaker=self)

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        self.priorities.append(priority)
        self.calls.append(([policy.identity.version for policy in policies], detail))
        answers = (
            self.first_look_answers
            if detail == "score"
            else [self.answers[policy.identity.version] for policy in policies]
        )
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, Assessment)]

    def count_and_allow(self, _policy: Policy, action: Action, tenant: str | None) -> bool:
        self.counted_actions.append(action)
        self.counted_tenants.append(tenant)
        return not (self.is_breaker_open and action == "block")


class _Images:
    """Every object has the same bytes."""

    def __init__(self, ports: FakePorts) -> None:
        self._ports = ports

    def open(self, _reference: ObjectReference) -> AbstractAsyncContextManager[StoredObject]:
        return self._ports.open_object()

    async def is_current_version(self, _reference: ObjectReference) -> bool:
        return True


class FakePreparer:
    """Decodes nothing: the bytes are the image."""

    async def prepare(self, data: bytes) -> PreparedImage:
        return PreparedImage(data, "image/jpeg", 8, 8, "0", ImageFacts(width=8, height=8, format="jpeg"))

    async def prepare_first_look(self, image: PreparedImage) -> PreparedImage:
        return image
