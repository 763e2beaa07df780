"""Kills decoder processes with more threads than any decoder needs.

A decoder that runs an attacker's code could otherwise take every process id of its container or machine. The kernel has
no limit that fits: seccomp cannot count, RLIMIT_NPROC counts the threads of all processes of the user, and a thread
needs no address space, so RLIMIT_AS does not bound their number. The decoder of HEIC needs one thread of its own.
"""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Protocol

THREADS_LIMIT: Final = 16
"""A decoder has two threads, and the one of HEIC four at most."""
_INTERVAL_S: Final = 0.05

_log = logging.getLogger(__name__)


class Watched(Protocol):
    """A child process that is not reaped while it is watched."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...


class ThreadWatch:
    """A thread that looks at all decoders of a pool, at busy and idle ones, until `stop`."""

    def __init__(self, find_decoders: Callable[[], Collection[Watched]]) -> None:
        self._find_decoders = find_decoders
        self._stopped = threading.Event()
        self._killed: set[int] = set()
        threading.Thread(target=self._watch, name="decoder-threads", daemon=True).start()

    def stop(self) -> None:
        """End the thread soon. Safe to repeat."""
        self._stopped.set()

    def has_killed(self, pid: int) -> bool:
        """Whether a decoder was killed here. Answers once for each decoder, and then forgets it."""
        killed = pid in self._killed
        self._killed.discard(pid)
        return killed

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            for decoder in self._find_decoders():
                threads = count_threads(decoder.pid)
                if threads > THREADS_LIMIT and decoder.pid not in self._killed:
                    self._killed.add(decoder.pid)
                    decoder.kill()
                    _log.warning(
                        "an image decoder had %d threads; the limit is %d; it was killed and is replaced; it may have "
                        "been taken over",
                        threads,
                        THREADS_LIMIT,
                    )


def count_threads(pid: int) -> int:
    """The threads of a process, or 0 if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat.rpartition(b")")[2].split()[17])
