"""Crash isolation finds the message that crashes intake processes, and protects the other messages.

`pipelines.intake.crash_registry` counts the crashes of each message. Their number decides:

- A message with one crash is **suspected**: a few suspected messages at most run at the same time.
- A message with two crashes is **isolated**: it runs alone in its process.
- A message with three crashes is **confirmed poison**: it ran alone in the last one. It ends here: it is not parsed
  again, and `find_poison_error` returns the error with which `Lane` makes it a dead letter. Messages that ran at the
  same time as it are not blamed.

Neither restriction lasts longer than `_ISOLATION_S`, so a message that waits, for example for S3, does not hold up the
others.

`services.guard.slots` uses the same three words for images that crash the engine. There, a suspected image is isolated
when it is tried again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Self

from pipelines.intake.crash_registry import CrashRegistry
from services.core.errors import GuardFailed
from services.core.redis import RedisClient

MAX_CRASHES: Final = 3
"""A message with this many crashes is confirmed poison."""

_SUSPECT_CONCURRENCY: Final = 8
_ISOLATION_S: Final = 20.0
"""The longest time that other messages wait for a suspected or isolated one. A poison message crashes its process much
sooner."""


def find_poison_error(crashes: int) -> GuardFailed | None:
    """Return the error of the dead letter if a message with so many crashes is confirmed poison, else None."""
    if crashes < MAX_CRASHES:
        return None
    return GuardFailed(f"the message crashed an intake process {MAX_CRASHES} times, the last time alone")


@contextmanager
def _limit_isolation(end_isolation: Callable[[], None]) -> Iterator[None]:
    """Call `end_isolation` at the end of the block, or after `_ISOLATION_S`, whichever comes first."""
    timer = asyncio.create_task(asyncio.sleep(_ISOLATION_S))
    timer.add_done_callback(lambda _: end_isolation())
    try:
        yield
    finally:
        timer.cancel()


class CrashIsolation:
    """Decides which messages one intake process may process at the same time. Use it as an async context manager."""

    def __init__(self, redis: RedisClient, group: str, member: str) -> None:
        """`member` is the name of this process. A restarted process needs another name."""
        self.registry = CrashRegistry(redis, group, member)
        self._suspect_slots = asyncio.Semaphore(_SUSPECT_CONCURRENCY)
        self._running = 0
        self._exclusive_source: str | None = None
        """The message that runs alone."""
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.registry.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.registry.__aexit__(*error)

    async def register(self, sources: Sequence[str]) -> list[int]:
        """Return the crashes of each message.

        Messages without a crash are registered until `release`. Messages with crashes are registered by `isolate`, only
        while they run, so that a crash is blamed on the message that caused it.
        """
        return await self.registry.register(sources)

    def release(self, source: str) -> None:
        """Remove the message from the registry, because it is no longer in flight."""
        self.registry.remove(source)

    @asynccontextmanager
    async def isolate(self, source: str, crashes: int, *, parse: bool = False) -> AsyncIterator[None]:
        """Wait until a message with that many crashes may be processed, and keep its restriction during the block.

        With `parse` the block only parses the message. That takes a moment, so a suspected message does not wait for
        one of the few slots then.
        """
        if parse and crashes < MAX_CRASHES - 1:
            async with self._keep_registered(source):
                yield
        elif crashes == 0:
            async with self._run_unrestricted():
                yield
        elif crashes < MAX_CRASHES - 1:
            async with self._run_limited(source):
                yield
        else:
            async with self._run_exclusively(source):
                yield

    @asynccontextmanager
    async def _run_unrestricted(self) -> AsyncIterator[None]:
        await self._wait_until(lambda: self._exclusive_source is None)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._notify()

    @asynccontextmanager
    async def _run_limited(self, source: str) -> AsyncIterator[None]:
        await self._suspect_slots.acquire()
        with _limit_isolation(self._suspect_slots.release):
            async with self._run_unrestricted(), self._keep_registered(source):
                yield

    @asynccontextmanager
    async def _run_exclusively(self, source: str) -> AsyncIterator[None]:
        await self._wait_until(lambda: self._exclusive_source is None)
        self._exclusive_source = source

        def end_isolation() -> None:
            self._exclusive_source = None
            self.registry.remove(source)  # a crash from here on may be caused by another message
            self._notify()

        with _limit_isolation(end_isolation):
            await self._wait_until(lambda: not self._running or self._exclusive_source != source)
            if self._exclusive_source == source:
                await self.registry.add(source)
            yield

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()  # wakes every waiting task, which then checks its condition
        self._changed.clear()

    @asynccontextmanager
    async def _keep_registered(self, source: str) -> AsyncIterator[None]:
        try:
            await self.registry.add(source)
            yield
        finally:
            self.registry.remove(source)
