"""How the process that talks to the service handles the errors of one request. No cluster is needed."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from pipelines.clients.judge_client import JudgeRequest
from pipelines.clients.judge_process import _judge
from services.core.errors import ConfigurationError
from services.core.messages import Submission
from services.policies.document import BUILT_IN


class EarlierIntake:
    """The deployment of an earlier version: it takes a request and policies, and no image."""

    async def judge_under(self, _submission: Submission, policies: Sequence[str]) -> list[Any]:
        return list(policies)


class FakeMethod:
    """A method of a deployment handle: its errors arrive as Ray's."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self._method = method

    async def remote(self, *arguments: Any) -> Any:
        try:
            return await self._method(*arguments)
        except Exception as error:  # noqa: BLE001 - Ray wraps whatever the method raises
            raise RayTaskError("judge_under", "a traceback", error).as_instanceof_cause() from None


class FakeHandle:
    def __init__(self, intake: EarlierIntake) -> None:
        self.judge_under = FakeMethod(intake.judge_under)


async def test_service_of_earlier_version_judges_objects() -> None:
    request = JudgeRequest(Submission(id="a", uri="s3://uploads/a.jpg"), ("default@1",))
    assert await _judge(FakeHandle(EarlierIntake()), request) == ["default@1"]  # type: ignore[arg-type]


async def test_image_for_service_of_earlier_version_error_says_upgrade() -> None:
    request = JudgeRequest.of_bytes("a", b"image", BUILT_IN.as_version(0))
    with pytest.raises(ConfigurationError, match=r"earlier version of Sluice.*upgrade the service"):
        await _judge(FakeHandle(EarlierIntake()), request)  # type: ignore[arg-type]
