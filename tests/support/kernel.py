"""What the kernel of this machine can forbid a process, found out without the code under test."""

import ctypes
from pathlib import Path
from typing import Final

import pytest

_LIBC: Final = ctypes.CDLL(None)
_LANDLOCK_CREATE_RULESET: Final = 444
_GET_VERSION: Final = 1


def landlock_version() -> int:
    """0 if the kernel has no Landlock."""
    return max(0, int(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _GET_VERSION)))


def has(measure: str) -> bool:
    """Whether the kernel has a measure of `services.images.decoder_sandbox`."""
    if measure == "landlock":
        return landlock_version() > 0
    if measure == "seccomp":
        return "\nSeccomp_filters:" in Path("/proc/self/status").read_text()
    return True


def skip_without(*measures: str) -> None:
    """Skip the test if the kernel has none of the measures."""
    if not any(map(has, measures)):
        pytest.skip(f"this kernel has no {' and no '.join(measures)}")
