"""Judges images on the running service, for a command.

No verdict is published, and no metric of submissions or actions counts the images. The circuit breaker is not applied.

Ray runs in a child process, `pipelines.clients.judge_process`, because its library writes to stderr and waits minutes
for a cluster that has ended. So the command can end at once, with an error message of one sentence.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from types import MappingProxyType
from typing import Any, Final, Self

from pipelines.clients.ray_address import NO_CLUSTER, is_reachable
from services.core.errors import ConfigurationError, GuardFailed, SluiceError, Unjudgeable
from services.core.messages import ImageRequest, Upload, Verdict
from services.core.processes import start_helper
from services.core.settings import Settings
from services.core.values import Policy
from services.guard.checkpoints import assume_in_flight

Progress = Callable[[str], None]
JudgeResult = list[Verdict | GuardFailed] | Unjudgeable
"""The answer of each policy of a request, in their order; or why the image cannot be judged at all."""

_CONNECT_S: Final = 120.0
_POLL_S: Final = 2.0
_FAILED_CHECKS: Final = 3
"""The service counts as ended after so many failed connections in a row."""
_SHUTDOWN_S: Final = 5.0
_PROGRESS_LOG_S: Final = 5.0
_IN_FLIGHT_LIMIT: Final = 64


def _read_only(mapping: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(mapping)


# Policies have read-only mappings, which cannot be pickled without help.
ForkingPickler.register(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """An image, and the policies to judge it by: versions such as `default@3`, or policies that are not published."""

    submission: ImageRequest
    policies: tuple[str | Policy, ...]
    image: bytes | None = None
    """The image file; None if the service fetches the object that the submission names."""

    @classmethod
    def of_bytes(cls, submission_id: str, image: bytes, policy: Policy) -> Self:
        """A request with its image, so the service reads no bucket."""
        return cls(Upload(id=submission_id, uri=Upload.make_uri(image), policy=policy.identity.name), (policy,), image)


class JudgeClient:
    """The connection to a running service."""

    def __init__(self, address: str, channel: "Connection[Any, Any]") -> None:
        self._address = address
        self._channel = channel

    def judge(self, requests: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        """The result of each request, in their order. Live submissions have priority.

        Raises:
            ConfigurationError: the service has ended, or it is of an earlier version.
            SluiceError: the service cannot judge now.
        """
        results: dict[int, JudgeResult] = {}
        self._send(list(requests))
        next_progress = time.monotonic() + _PROGRESS_LOG_S
        while len(results) < len(requests):
            number, result = self._receive()
            results[number] = result
            if time.monotonic() >= next_progress:
                progress(f"{len(results)} of {len(requests)} judged")
                next_progress = time.monotonic() + _PROGRESS_LOG_S
        return [results[number] for number in range(len(requests))]

    def wait_until_connected(self) -> None:
        """Raises ConfigurationError if there is no service."""
        self._receive(within_s=_CONNECT_S)

    def _send(self, message: object) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise self._ended_error() from None

    def _receive(self, within_s: float = float("inf")) -> Any:
        """The next message of the child process. It may take long while the service is busy, or waits for S3."""
        deadline, failed_checks = time.monotonic() + within_s, 0
        while not self._channel.poll(_POLL_S):
            failed_checks = 0 if is_reachable(self._address) else failed_checks + 1
            if failed_checks == _FAILED_CHECKS:
                raise self._ended_error()
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"the Ray cluster at {self._address} did not answer within {within_s:g} s; check the service and "
                    "try again"
                )
        try:
            message = self._channel.recv()
        except (EOFError, OSError):
            raise self._ended_error() from None
        if isinstance(message, SluiceError):
            raise message
        return message

    def _ended_error(self) -> ConfigurationError:
        return ConfigurationError(f"the service at {self._address} (SLUICE_RAY_ADDRESS) has ended; start it again")


@contextmanager
def open_client(settings: Settings) -> Iterator[JudgeClient]:
    """Connect to the service on the Ray cluster at `settings.ray_address`.

    Raises:
        ConfigurationError: no service runs there, or it does not answer.
    """
    address = settings.ray_address or ""
    if address in NO_CLUSTER:
        raise ConfigurationError(
            "SLUICE_RAY_ADDRESS is not set to the address of a service; start one with `sluice up`, and run this "
            "command in the same folder"
        )
    if not is_reachable(address):
        raise ConfigurationError(
            f"no service runs at SLUICE_RAY_ADDRESS ({address}); start one with `sluice up`, or correct the setting"
        )
    in_flight = min(assume_in_flight(settings) * settings.guard_replicas, _IN_FLIGHT_LIMIT)
    ours, theirs = Pipe()
    with ours:
        child = start_helper(
            "pipelines.clients.judge_process",
            str(theirs.fileno()),
            address,
            str(in_flight),
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        shutdown_s = 0.0
        try:
            service = JudgeClient(address, ours)
            service.wait_until_connected()
            yield service
            shutdown_s = _SHUTDOWN_S
        finally:
            ours.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(shutdown_s)
            child.kill()
            child.wait()
