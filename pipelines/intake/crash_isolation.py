"""Messages that were in hand when an intake process died: one of them may be what killed it.

Each message that a process touches is marked in Redis before it is touched. The marks of a process that fell silent
are counted by the others as crashes of those messages. One with a crash is worked on among a few, one with two alone,
and one that killed a process then, too, is not touched again: so the third crash convicts nobody who merely stood by.
Neither company lasts for longer than `_COMPANY_S`; after that a message that waits, say for S3, is like any other.
Nothing here is needed for delivery: while Redis is away, messages are worked on without marks.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, Self

from services.core.errors import GuardFailed
from services.core.tasks import cancel_and_wait
from services.policies.redis_cache import CacheUnavailable, PolicyRedisCache

CRASHES: Final = 3
"""What one message may cost."""

_FEW: Final = 8
_BEAT_S: Final = 1.0
_SILENT_S: Final = 4.0
"""A process that says nothing for this long is dead, or so slow that its messages deserve a closer look."""
_REMEMBERED_S: Final = 86_400
_COMPANY_S: Final = 20.0
"""What kills does so when it is touched. One that waits for longer, say for S3, does not hold up the others."""

# Counts the crashes of the silent, says that this process is alive and which messages it has in hand, and adds those of
# the new messages that never were in a crash. Returns how many crashes each of the new ones was in.
_MARK: Final = """
local alive, in_hand, prefix, me = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', now - ARGV[3])) do
    if silent ~= me then
        for _, source in ipairs(redis.call('SMEMBERS', prefix .. 'in-hand:' .. silent)) do
            redis.call('INCR', prefix .. 'crashes:' .. source)
            redis.call('EXPIRE', prefix .. 'crashes:' .. source, ARGV[4])
        end
        redis.call('DEL', prefix .. 'in-hand:' .. silent)
        redis.call('ZREM', alive, silent)
    end
end
redis.call('ZADD', alive, now, me)
redis.call('DEL', in_hand)
local crashes = {}
for i = 6, #ARGV do
    local is_new = i - 5 > tonumber(ARGV[5])
    local count = is_new and tonumber(redis.call('GET', prefix .. 'crashes:' .. ARGV[i])) or 0
    if count == 0 then redis.call('SADD', in_hand, ARGV[i]) end
    if is_new then crashes[#crashes + 1] = count end
end
return crashes
"""
_LEAVE: Final = "redis.call('ZREM', KEYS[1], ARGV[1]) redis.call('DEL', KEYS[2])"

log = logging.getLogger(__name__)


def convicted() -> GuardFailed:
    """Why a message is not touched any more."""
    return GuardFailed(f"it made a worker crash {CRASHES} times")


@contextmanager
def _for_a_while(let_go: Callable[[], None]) -> Iterator[None]:
    """Call `let_go` at the end of the block, or after `_COMPANY_S`, whichever comes first."""
    timer = asyncio.create_task(asyncio.sleep(_COMPANY_S))
    timer.add_done_callback(lambda _: let_go())
    try:
        yield
    finally:
        timer.cancel()


class Quarantine:
    """What one intake process may touch at a time. To be used as an async context manager."""

    def __init__(self, shared: PolicyRedisCache, group: str, member: str) -> None:
        """`member` names this process, and no earlier life of it."""
        self._shared = shared
        self._prefix = f"sluice:{group}:"
        self._member = member
        self._in_hand: set[str] = set()
        self._marking = asyncio.Lock()
        self._away = False
        """Redis did not answer the last time. Then only the beat asks it: one that hangs must not slow the work."""
        self._few = asyncio.Semaphore(_FEW)
        self._working = 0
        self._alone: str | None = None
        """The message that no other one may be worked on beside."""
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)
        with suppress(CacheUnavailable):
            await self._shared.run(_LEAVE, self._keys, self._member)

    async def admit(self, sources: Sequence[str]) -> list[int]:
        """How many crashes each message was in. Those that were in none are marked until they are released."""
        if not self._away:
            return await self._mark(sources) if sources else []
        self._in_hand.update(sources)  # so that they are marked when Redis is back
        return [0] * len(sources)

    def release(self, source: str) -> None:
        """The message is not worked on any more."""
        self._in_hand.discard(source)

    @asynccontextmanager
    async def reading(self, source: str, crashes: int) -> AsyncIterator[None]:
        """Read a message. That is over at once, so one with a single crash does not wait for its company here."""
        async with self._marked(source) if crashes < CRASHES - 1 else self.touching(source, crashes):
            yield

    @asynccontextmanager
    async def touching(self, source: str, crashes: int) -> AsyncIterator[None]:
        """Work on a message, in the company that its crashes allow; it waits for that company first."""
        if crashes == 0:
            async with self._among_others():
                yield
        elif crashes < CRASHES - 1:
            await self._few.acquire()
            with _for_a_while(self._few.release):
                async with self._among_others(), self._marked(source):
                    yield
        else:
            async with self._by_itself(source):
                yield

    @asynccontextmanager
    async def _among_others(self) -> AsyncIterator[None]:
        await self._until(lambda: self._alone is None)
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
            self._tell()

    @asynccontextmanager
    async def _by_itself(self, source: str) -> AsyncIterator[None]:
        await self._until(lambda: self._alone is None)
        self._alone = source

        def admit_others() -> None:
            self._alone = None
            self.release(source)  # what others do now convicts nobody
            self._tell()

        with _for_a_while(admit_others):
            await self._until(lambda: not self._working or self._alone != source)
            if self._alone == source:
                await self._announce(source)
            yield

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()  # whoever waits now looks again
        self._changed.clear()

    @asynccontextmanager
    async def _marked(self, source: str) -> AsyncIterator[None]:
        try:
            await self._announce(source)
            yield
        finally:
            self.release(source)

    async def _announce(self, source: str) -> None:
        self._in_hand.add(source)
        if not self._away:
            await self._mark()

    async def _mark(self, new: Sequence[str] = ()) -> list[int]:
        async with self._marking:
            known: tuple[str | float, ...] = (
                self._prefix,
                self._member,
                _SILENT_S,
                _REMEMBERED_S,
                len(self._in_hand),
                *self._in_hand,
            )
            try:
                crashes: list[int] = await self._shared.run(_MARK, self._keys, *known, *new)
                self._away = False
            except CacheUnavailable as error:
                log.debug("messages are worked on without marks: %s", error)
                crashes = [0] * len(new)
                self._away = True
            self._in_hand.update(source for source, count in zip(new, crashes, strict=True) if count == 0)
            return crashes

    async def _beat(self) -> None:
        while True:
            await self._mark()
            await asyncio.sleep(_BEAT_S)

    @property
    def _keys(self) -> list[str]:
        return [f"{self._prefix}alive", f"{self._prefix}in-hand:{self._member}"]
