"""How long to try, and when to give up: waiting for what is away, without making an outage worse."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from services.core import telemetry
from services.core.errors import Unavailable

_LONGEST_WAIT_S: Final = 10.0
_RETRIES_PER_S: Final = 10.0
_RETRIES_AT_ONCE: Final = 50.0
_GIVE_UPS_PER_SUCCESS: Final = 0.02
_GIVE_UPS_AT_ONCE: Final = 10.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class RetryBudget:
    """A process' tries after the first ones, all steps together: so many a second, whoever makes them.

    Those over it wait longer; nothing fails because of it.
    """

    def __init__(
        self,
        per_s: float = _RETRIES_PER_S,
        at_once: float = _RETRIES_AT_ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_s = per_s
        self._at_once = at_once
        self._clock = clock
        self._left = at_once
        self._seen_at = clock()

    def wait_s(self) -> float:
        """Take one retry; the seconds to wait before it may be made."""
        now = self._clock()
        self._left = min(self._at_once, self._left + (now - self._seen_at) * self._per_s)
        self._seen_at = now
        self._left -= 1
        return max(0.0, -self._left / self._per_s)


class FailureBudget:
    """Whether a submission may be given up, so that an outage never empties a stream into the dead letters.

    Each success earns a fiftieth of a give-up, ten at most are saved, and there are none at the start: a small share
    of all, a small number in a row, and none while nothing succeeds.
    """

    def __init__(
        self, per_success: float = _GIVE_UPS_PER_SUCCESS, at_once: float = _GIVE_UPS_AT_ONCE, left: float = 0.0
    ) -> None:
        self._per_success = per_success
        self._at_once = at_once
        self._left = left

    def succeeded(self) -> None:
        """Count a submission that was judged."""
        self._left = min(self._at_once, self._left + self._per_success)

    def take(self) -> bool:
        """Take one give-up, if there is one."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


_PROCESS_BUDGET: Final = RetryBudget()


async def retry_while_unavailable(step: Callable[[], Awaitable[T]], budget: RetryBudget = _PROCESS_BUDGET) -> T:
    """Repeat `step` with full jitter, up to 10 s apart, for as long as something it needs is away."""

    def count(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        telemetry.count_retry(error)
        log.log(logging.WARNING if state.attempt_number == 3 else logging.DEBUG, "waiting: %s", error)

    full_jitter = wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_S)
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(Unavailable),
        wait=lambda state: max(full_jitter(state), budget.wait_s()),
        before_sleep=count,
        sleep=asyncio.sleep,
        reraise=True,
    )

    async def attempt() -> T:
        return await step()  # tenacity awaits coroutine functions only, not whatever returns an awaitable

    return await retrying(attempt)
