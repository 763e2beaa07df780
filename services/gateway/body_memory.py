"""The memory that request bodies and fetched images may take together.

`BodyMemory` counts it and refuses bytes over the limit, and a `MemoryLease` has the bytes of one request. The memory of
the images that the moderator fetches is a `ByteBudget` (services/images/memory_budget.py), where requests wait.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from services.gateway.problems import HttpProblem

_KEY_SHARE: Final = 4
"""One API key gets at most this fraction (1/4) of the memory, so that some is left for the others."""


class BodyMemory:
    """Counts the bytes of all bodies. Bytes over the limit are refused: a waiting request would keep its bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = Counter[str]()

    @property
    def used_bytes(self) -> int:
        """The bytes of all owners together."""
        return sum(self._used_bytes.values())

    @contextmanager
    def lease(self, owner: str) -> "Iterator[MemoryLease]":
        """Give one request a lease for the block. Its bytes are released when the block ends."""
        lease = MemoryLease(self, owner)
        try:
            yield lease
        finally:
            lease.release()

    def reserve(self, owner: str, size_bytes: int) -> None:
        """
        Raises:
            HttpProblem: the owner or all owners together would exceed their limit.
        """
        if self._used_bytes[owner] + size_bytes > self._limit_bytes // _KEY_SHARE:
            raise HttpProblem(
                "too-many-at-once", "the concurrent requests of this API key need too much memory; send fewer at a time"
            )
        if self.used_bytes + size_bytes > self._limit_bytes:
            raise HttpProblem("overloaded", "the gateway has no memory left for request bodies; try again later")
        self._used_bytes[owner] += size_bytes

    def release(self, owner: str, size_bytes: int) -> None:
        """Give back bytes that `reserve` took."""
        self._used_bytes[owner] -= size_bytes
        if not self._used_bytes[owner]:
            del self._used_bytes[owner]


class MemoryLease:
    """The bytes that one request holds."""

    def __init__(self, memory: BodyMemory, owner: str) -> None:
        self._memory = memory
        self._owner = owner
        self._held_bytes = 0

    def reserve(self, size_bytes: int) -> None:
        """Hold more bytes. Raises what `BodyMemory.reserve` raises."""
        self._memory.reserve(self._owner, size_bytes)
        self._held_bytes += size_bytes

    def release(self) -> None:
        """Give back all bytes."""
        self._memory.release(self._owner, self._held_bytes)
        self._held_bytes = 0
