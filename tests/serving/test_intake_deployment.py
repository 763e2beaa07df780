"""The image of a request to the Intake deployment: taken from the request or fetched. No cluster is needed."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.serving.intake_deployment import IntakeDeployment
from services.core.errors import TooLarge
from services.core.messages import ImageRequest, Submission, Upload
from services.core.values import Policy, StoredObject
from services.policies.document import BUILT_IN

LIMIT_BYTES = 10
POLICY = BUILT_IN.as_version(1)


class FakeModerator:
    """Keeps the image that each request came with; None if the object is to be fetched."""

    def __init__(self) -> None:
        self.images: list[bytes | None] = []

    async def judge_under(
        self, request: ImageRequest, policies: Sequence[Policy], *, upload: StoredObject | None = None
    ) -> list[Any]:
        self.images.append(upload.data if upload else None)
        return [(request.uri, policy.identity.name) for policy in policies]


@pytest.fixture
def moderator() -> FakeModerator:
    return FakeModerator()


async def judge_under(moderator: FakeModerator, request: ImageRequest, image: bytes | None) -> Any:
    """Call the deployment's method for a replica that is a member of no group."""
    replica = SimpleNamespace(_moderator=moderator, _image_limit_bytes=LIMIT_BYTES)
    return await IntakeDeployment.func_or_class.judge_under(replica, request, [POLICY], image)  # type: ignore[attr-defined]


def upload(image: bytes) -> Upload:
    return Upload(id="upl-1", uri=Upload.make_uri(image))


async def test_image_with_the_request_is_judged(moderator: FakeModerator) -> None:
    image = b"x" * LIMIT_BYTES
    assert await judge_under(moderator, upload(image), image) == [(Upload.make_uri(image), "default")]
    assert moderator.images == [image]


async def test_empty_image_with_the_request_is_judged_and_not_fetched(moderator: FakeModerator) -> None:
    await judge_under(moderator, upload(b""), b"")
    assert moderator.images == [b""]


async def test_request_without_image_fetches_the_object(moderator: FakeModerator) -> None:
    uri = "s3://uploads/a"
    assert await judge_under(moderator, Submission(id="upl-1", uri=uri), None) == [(uri, "default")]
    assert moderator.images == [None]


async def test_image_larger_than_the_limit_is_rejected(moderator: FakeModerator) -> None:
    image = b"x" * (LIMIT_BYTES + 1)
    with pytest.raises(TooLarge, match="the image has 11 bytes, more than 10"):
        await judge_under(moderator, upload(image), image)
    assert moderator.images == []
