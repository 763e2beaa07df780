"""A client that lets a command judge submissions on the running service. Nothing is published, counted or acted upon.

Ray runs in a child process, `pipelines.clients.judge_process`, for two reasons: Ray's library writes noise to stderr,
and it waits minutes for a cluster that has ended. The command can therefore end at once, with one sentence.
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

from pipelines.clients.ray_address import NO_CLUSTER, answers
from services.core.errors import ConfigurationError, GuardFailed, SluiceError, Unjudgeable
from services.core.messages import ImageRequest, Upload, Verdict
from services.core.processes import start_helper
from services.core.settings import Settings
from services.core.values import Policy

Progress = Callable[[str], None]
JudgeResult = list[Verdict | GuardFailed] | Unjudgeable
"""What each policy makes of a submission, in their order; or why none can make anything of it."""

_CONNECT_S: Final = 120.0
_ANSWER_S: Final = 2.0
_GONE_AFTER: Final = 3
_END_S: Final = 5.0
_PROGRESS_LOG_S: Final = 5.0
_IN_FLIGHT_LIMIT: Final = 64


def _read_only(mapping: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(mapping)


# What a policy document makes has read-only mappings, which have to be taught to travel.
ForkingPickler.register(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One submission, and what it is to be judged by: versions such as `default@3`, or policies not published yet."""

    submission: ImageRequest
    policies: tuple[str | Policy, ...]
    image: bytes | None = None
    """The image file's bytes; None if the service is to fetch the submission's object."""

    @classmethod
    def of_bytes(cls, submission_id: str, image: bytes, policy: Policy) -> Self:
        """A request that carries its image, so that the service reads no bucket for it."""
        return cls(Upload(id=submission_id, uri=Upload.make_uri(image), policy=policy.identity.name), (policy,), image)


class JudgeClient:
    """A running service, to judge on."""

    def __init__(self, address: str, channel: "Connection[Any, Any]") -> None:
        self._address = address
        self._channel = channel

    def judge(self, trials: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        """The outcome of each trial, in their order. They are judged behind all live submissions.

        Raises:
            ConfigurationError: the service has ended.
            SluiceError: it cannot judge now.
        """
        outcomes: dict[int, JudgeResult] = {}
        self._send(list(trials))
        next_progress = time.monotonic() + _PROGRESS_LOG_S
        while len(outcomes) < len(trials):
            number, outcome = self._receive()
            outcomes[number] = outcome
            if time.monotonic() >= next_progress:
                progress(f"{len(outcomes)} of {len(trials)} judged")
                next_progress = time.monotonic() + _PROGRESS_LOG_S
        return [outcomes[number] for number in range(len(trials))]

    def wait_until_connected(self) -> None:
        """Raises ConfigurationError, where there is no service."""
        self._receive(within_s=_CONNECT_S)

    def _send(self, message: object) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise self._gone() from None

    def _receive(self, within_s: float = float("inf")) -> Any:
        """The next message; a judgement may take as long as the service is busy with others, or waits for S3."""
        deadline, silent = time.monotonic() + within_s, 0
        while not self._channel.poll(_ANSWER_S):
            silent = 0 if answers(self._address) else silent + 1
            if silent == _GONE_AFTER:
                raise self._gone()
            if time.monotonic() > deadline:
                raise ConfigurationError(f"the service's Ray cluster at {self._address} does not answer; is it well?")
        try:
            message = self._channel.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(message, SluiceError):
            raise message
        return message

    def _gone(self) -> ConfigurationError:
        return ConfigurationError(f"the service at {self._address} (SLUICE_RAY_ADDRESS) has ended; start it again")


@contextmanager
def open_client(settings: Settings) -> Iterator[JudgeClient]:
    """The service that runs on the Ray cluster `settings.ray_address`. It is left running.

    Raises:
        ConfigurationError: no service runs there, or it cannot be reached.
    """
    address = settings.ray_address or ""
    if address in NO_CLUSTER:
        raise ConfigurationError(
            "SLUICE_RAY_ADDRESS does not say where a service runs; start one with `sluice up`, and be in its folder"
        )
    if not answers(address):
        raise ConfigurationError(
            f"no service runs at SLUICE_RAY_ADDRESS ({address}); start one with `sluice up`, or correct the setting"
        )
    in_flight = min(settings.guard_in_flight * settings.guard_replicas, _IN_FLIGHT_LIMIT)
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
        patience_s = 0.0
        try:
            service = JudgeClient(address, ours)
            service.wait_until_connected()
            yield service
            patience_s = _END_S
        finally:
            ours.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience_s)
            child.kill()
            child.wait()
