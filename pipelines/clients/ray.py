"""Joins Ray clusters, waits for Ray Serve applications, and reduces the errors of Ray to one sentence."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from pipelines.clients.ray_address import answers
from services.core.errors import ConfigurationError, SluiceError

QUIET: Final[dict[str, Any]] = {"logging_level": "ERROR", "log_to_driver": False}
OBJECT_STORE_BYTES: Final = 200 << 20
"""Images travel inline in calls, so a small store is enough. Ray's own default takes 30 % of the memory."""
_POLL_S: Final = 0.25
_PROGRESS_S: Final = 15.0


def join(address: str) -> None:
    """Join the cluster at SLUICE_RAY_ADDRESS.

    Raises:
        ConfigurationError: it does not answer, or does not let this process in.
    """
    if not answers(address):
        raise ConfigurationError(
            f"no Ray cluster answers at SLUICE_RAY_ADDRESS ({address}); start it, or unset it to use this machine alone"
        )
    try:
        with silent():
            ray.init(address, **QUIET)
    except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes
        raise ConfigurationError(
            f"the Ray cluster at {address} cannot be joined ({last_line(error)}); be the user who started it, or set "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are there"
        ) from None


@contextmanager
def silent() -> Iterator[None]:
    """Keep from stderr what Ray's native library has to say; for the main thread, and not for long."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def last_line(said: object) -> str:
    """The end of what Ray says, which is where it gets to the point; at most 300 characters."""
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def own_error(error: BaseException | None) -> SluiceError | None:
    """Sluice's own error among the causes of an error of Ray, if there is one."""
    while error is not None:
        # Serve's error is also an instance of its cause's class, but its text is a traceback.
        if isinstance(error, SluiceError) and not isinstance(error, RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def deploy_failure_cause(messages: str) -> str:
    """One sentence from messages of Ray Serve: Sluice's own error where there is one, else the last line."""
    own = re.findall(r"services\.(?:\w+\.)*errors\.\w+: (.+)", messages)
    return own[-1] if own else f"{last_line(messages)} (Ray's logs: /tmp/ray/session_latest/logs)"


def wait_until_running(
    application: str,
    *,
    is_ready: Callable[[], bool] = lambda: True,
    loading: str,
    progress: Callable[[str], None],
    explain: Callable[[str], str],
) -> None:
    """Wait until every replica of a deployed application runs and `is_ready` is true.

    `loading` is reported from time to time; `explain` makes the error's text from the messages of Ray Serve.

    Raises:
        ConfigurationError: the application could not be deployed.
    """
    started, next_progress_s = time.monotonic(), 0.0
    while True:
        status = serve.status().applications[application]
        if status.status == ApplicationStatus.RUNNING and is_ready():
            return
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise ConfigurationError(explain("; ".join(d.message for d in status.deployments.values() if d.message)))
        elapsed_s = time.monotonic() - started
        if elapsed_s >= next_progress_s:
            progress(f"{loading} ({elapsed_s:.0f} s)")
            next_progress_s = elapsed_s + _PROGRESS_S
        time.sleep(_POLL_S)
