"""How the process that talks to the service handles the errors of one request. No cluster is needed."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import RaySystemError, RayTaskError

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
        self.wraps_errors = True

    async def remote(self, *arguments: Any) -> Any:
        try:
            return await self._method(*arguments)
        except Exception as error:
            if not self.wraps_errors:
                raise
            raise RayTaskError("judge_under", "a traceback", error).as_instanceof_cause() from None


class FakeHandle:
    def __init__(self, intake: EarlierIntake) -> None:
        self.judge_under = FakeMethod(intake.judge_under)


async def test_service_of_earlier_version_judges_objects() -> None:
    request = JudgeRequest(Submission(id="a", uri="s3://uploads/a.jpg"), ("default@1",))
    assert await _judge(FakeHandle(EarlierIntake()), request) == ["default@1"]  # type: ignore[arg-type]


async def test_image_for_service_without_the_argument_error_says_upgrade() -> None:
    request = JudgeRequest.of_bytes("a", b"image", BUILT_IN.as_version(0))
    with pytest.raises(ConfigurationError, match=r"another version of Sluice.*upgrade both"):
        await _judge(FakeHandle(EarlierIntake()), request)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_remote", [True, False])
async def test_service_with_other_modules_error_says_upgrade(is_remote: bool) -> None:
    """The service cannot load the request, or this process cannot load the answer."""

    class OtherIntake(EarlierIntake):
        async def judge_under(self, _submission: Submission, _policies: Sequence[str]) -> list[Any]:
            raise RaySystemError(ModuleNotFoundError("No module named 'services.contracts'"), "a traceback")

    handle = FakeHandle(OtherIntake())
    if not is_remote:
        handle.judge_under.wraps_errors = False
    request = JudgeRequest(Submission(id="a", uri="s3://uploads/a.jpg"), ("default@1",))
    with pytest.raises(ConfigurationError, match=r"another version of Sluice.*upgrade both"):
        await _judge(handle, request)  # type: ignore[arg-type]
