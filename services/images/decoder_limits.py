"""The memory that a decoder process may use, from the memory limit of the container and the number of processes.

A decoder without such a limit makes the kernel kill processes of the container, and with some settings the whole
container.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

_BASE_BYTES: Final = 1 << 30
_BYTES_PER_PX: Final = 16
_SHARE: Final = 0.5
"""The part of the machine's or container's memory that all decoders of a replica may use together."""
_MIN_BYTES: Final = 512 << 20
"""A decoder with less address space cannot decode usual photos. Its libraries alone take a third of this."""


def decoder_memory_bytes(image_px: int, workers: int, machine_bytes: int) -> int:
    """Return the limit of the address space of each of the `workers` processes.

    It is enough for an image of `image_px` pixels, unless the decoders together would take more than half of
    `machine_bytes`.
    """
    wanted = _BASE_BYTES + _BYTES_PER_PX * image_px
    return max(_MIN_BYTES, min(wanted, int(machine_bytes * _SHARE / workers)))


def find_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may use: that of the machine, or of the tightest of its cgroups.

    `root` contains the folders `proc` and `sys`.
    """
    machine = psutil.virtual_memory().total
    return min([machine, *_read_cgroup_limits(root)])


def _read_cgroup_limits(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        # In a container the path may be that of the host, and the container's own cgroup is then the mount itself.
        relative = PurePosixPath(path.strip("/"))
        for folder in (relative, *relative.parents):
            if ".." not in folder.parts:
                yield from _read_limit(root / "sys/fs/cgroup" / mount / folder / name)


def _read_limit(path: Path) -> Iterator[int]:
    try:
        yield int(path.read_text())
    except (OSError, ValueError):
        return  # the file does not exist, or it says `max`
