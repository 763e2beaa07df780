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


class Moderation:
    """Keeps the image that each request came with; None if the object is to be fetched."""

    def __init__(self) -> None:
        self.images: list[bytes | None] = []

    async def judge_under(
        self, request: ImageRequest, policies: Sequence[Policy], *, upload: StoredObject | None = None
    ) -> list[Any]:
        self.images.append(upload.data if upload else None)
        return [(request.uri, policy.identity.name) for policy in policies]


@pytest.fixture
def moderation() -> Moderation:
    return Moderation()


async def judge_under(moderation: Moderation, request: ImageRequest, image: bytes | None) -> Any:
    """Call the deployment's method for a replica that is a member of no group."""
    replica = SimpleNamespace(_moderator=moderation, _image_limit_bytes=LIMIT_BYTES)
    return await IntakeDeployment.func_or_class.judge_under(replica, request, [POLICY], image)  # type: ignore[attr-defined]


def upload(image: bytes) -> Upload:
    return Upload(id="upl-1", uri=Upload.uri_of(image))


async def test_image_with_the_request_is_judged(moderation: Moderation) -> None:
    image = b"x" * LIMIT_BYTES
    assert await judge_under(moderation, upload(image), image) == [(Upload.uri_of(image), "default")]
    assert moderation.images == [image]


async def test_empty_image_with_the_request_is_judged_and_not_fetched(moderation: Moderation) -> None:
    await judge_under(moderation, upload(b""), b"")
    assert moderation.images == [b""]


async def test_no_image_with_the_request_object_is_fetched(moderation: Moderation) -> None:
    uri = "s3://uploads/a"
    assert await judge_under(moderation, Submission(id="upl-1", uri=uri), None) == [(uri, "default")]
    assert moderation.images == [None]


async def test_image_larger_than_the_limit_is_rejected(moderation: Moderation) -> None:
    image = b"x" * (LIMIT_BYTES + 1)
    with pytest.raises(TooLarge, match="the image has 11 bytes, more than 10"):
        await judge_under(moderation, upload(image), image)
    assert moderation.images == []
