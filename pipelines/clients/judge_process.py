"""The process that talks to the running service for `pipelines.clients.judge_client`.

    python -m pipelines.clients.judge_process FD ADDRESS N

It sends None once it is connected. For each list of requests that it receives, it sends (number, result) for each
request, in the order in which they finish, and judges at most N at a time. A failure that ends the judging is sent as
a SluiceError. The process ends when the connection is closed.
"""

import asyncio
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayActorError, RaySystemError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.clients.judge_client import JudgeRequest, JudgeResult
from pipelines.clients.ray import connect_to_cluster, find_own_error
from pipelines.reporting.text import to_one_line
from pipelines.serving.names import APPLICATION, INTAKE
from services.core.errors import ConfigurationError, GuardUnavailable, SluiceError, Unavailable, Unjudgeable
from services.core.tasks import cancel_and_wait
from services.images.memory_budget import ByteBudget

_PAUSES_S: Final = (1.0, 5.0, 15.0)
"""Ray replaces a replica that died in this time."""
_OTHER_VERSION: Final = re.compile(
    r"judge_under\(\) (?:takes|got|missing)|No module named '(?:services|pipelines)\b|Can't get attribute '"
)
"""The errors of a service with other arguments, or with classes in other modules."""
_IMAGE_BYTES_IN_FLIGHT: Final = 64 << 20
"""The images in requests at a time. Ray stores each in its object store, which has 200 MiB under `sluice up`."""


def _connect(address: str) -> DeploymentHandle[Any]:
    connect_to_cluster(address)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.get_app_handle(APPLICATION)  # raises if the application does not run; the next line would not
        return serve.get_deployment_handle(INTAKE, APPLICATION)
    except (RayServeException, RayActorError, ValueError):
        raise ConfigurationError(
            f"Ray runs at {address}, but Sluice does not run on it; start it with `sluice up`"
        ) from None


async def _work(channel: "Connection[Any, Any]", intake: DeploymentHandle[Any], in_flight: int) -> None:
    def read() -> asyncio.Task[Any]:
        return asyncio.create_task(asyncio.to_thread(channel.recv))

    reading = read()
    while True:
        try:
            requests = await reading
        except (EOFError, OSError):
            return
        reading = read()
        judging = asyncio.create_task(_judge_all(channel, intake, requests, in_flight))
        await asyncio.wait([reading, judging], return_when=asyncio.FIRST_COMPLETED)
        await cancel_and_wait(judging)  # the results have no reader any more


async def _judge_all(
    channel: "Connection[Any, Any]", intake: DeploymentHandle[Any], requests: Sequence[JudgeRequest], in_flight: int
) -> None:
    waiting = iter(enumerate(requests))
    budget = ByteBudget(_IMAGE_BYTES_IN_FLIGHT)

    async def work() -> None:
        for number, request in waiting:
            async with budget.reserve(len(request.image or b"")):
                result = await _judge(intake, request)
            channel.send((number, result))

    tasks = [asyncio.create_task(work()) for _ in range(in_flight)]
    try:
        await asyncio.gather(*tasks)
    except SluiceError as error:
        channel.send(error)
    except Exception as error:  # noqa: BLE001 - the other process reports every error
        channel.send(SluiceError(f"the service failed: {type(error).__name__}: {to_one_line(error)}"))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _judge(intake: DeploymentHandle[Any], request: JudgeRequest) -> JudgeResult:
    submission = request.submission.model_copy(update={"priority": "backfill"})
    for pause_s in (*_PAUSES_S, None):
        # A service without this argument can still judge the requests that have no image.
        image = () if request.image is None else (request.image,)
        response = intake.judge_under.remote(submission, request.policies, *image)
        try:
            result: JudgeResult = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayTaskError, RaySystemError) as error:
            own = find_own_error(error)
            if isinstance(own, Unjudgeable):
                return own
            cause = own or getattr(error, "cause", None) or error
            if own is None and _OTHER_VERSION.search(str(cause)):
                raise ConfigurationError(
                    "the service runs another version of Sluice than this command, and they do not understand each "
                    "other; upgrade both to the same version, then run the command again"
                ) from None
            if not isinstance(own, Unavailable) or pause_s is None:
                raise cause from None
        except (RayActorError, RayServeException) as error:
            if pause_s is None:
                raise GuardUnavailable(f"the service does not answer ({type(error).__name__})") from None
        else:
            return result
        await asyncio.sleep(pause_s)
    raise AssertionError


def main() -> None:
    """Serve the connection with the given file descriptor."""
    channel: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        intake = _connect(sys.argv[2])
    except ConfigurationError as error:
        channel.send(error)
        return
    with suppress(OSError):
        channel.send(None)
        asyncio.run(_work(channel, intake, int(sys.argv[3])))
    ray.shutdown()


if __name__ == "__main__":
    main()
