"""Joining a Ray cluster, whatever Ray makes of it said in one sentence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray

from pipelines.clients.ray_address import answers
from services.core.errors import ConfigurationError

QUIET: Final[dict[str, Any]] = {"logging_level": "ERROR", "log_to_driver": False}


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
