"""Retries: how long to wait between tries, how many retries a process makes, and how many failures are accepted."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from services.core.errors import Unavailable

_FIRST_BACKOFF_S: Final = 0.1
_MAX_WAIT_S: Final = 10.0
_MAX_BLOCKING_WAIT_S: Final = 1.0
_RETRIES_PER_S: Final = 10.0
_RETRIES_BURST: Final = 50.0
_FAILURES_PER_SUCCESS: Final = 0.02
_FAILURES_BURST: Final = 10.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class RetryBudget:
    """Limits the retries a second of a whole process, over all its steps. Retries above the limit wait longer."""

    def __init__(
        self,
        per_s: float = _RETRIES_PER_S,
        burst: float = _RETRIES_BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._seen_at = clock()

    def reserve(self) -> float:
        """Reserve one retry. Returns the seconds to wait before it."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen_at) * self._per_s)
        self._seen_at = now
        self._left -= 1
        return max(0.0, -self._left / self._per_s)


class UnjudgedBudget:
    """How many submissions may end without a judgement for now, so that an outage does not end a whole stream so.

    Each judged submission earns `per_success` of an unjudged one, and at most `burst` are saved. By default the budget
    starts empty. So unjudged ones are a small share of all submissions, few in a row, and none while nothing succeeds.
    """

    def __init__(
        self, per_success: float = _FAILURES_PER_SUCCESS, burst: float = _FAILURES_BURST, left: float = 0.0
    ) -> None:
        self._per_success = per_success
        self._burst = burst
        self._left = left

    def record_success(self) -> None:
        """Count a submission that was judged."""
        self._left = min(self._burst, self._left + self._per_success)

    def take(self) -> bool:
        """Take one submission from the budget. Returns False if the budget is empty."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def backoff(max_s: float) -> Iterator[float]:
    """Seconds to wait before each retry, without end: doubling up to `max_s`, with jitter."""
    ceiling = _FIRST_BACKOFF_S
    while True:
        yield random.uniform(ceiling / 2, ceiling)
        ceiling = min(max_s, ceiling * 2)


_PROCESS_BUDGET: Final = RetryBudget()


def retry_blocking(step: Callable[[], T], *, within_s: float) -> T:
    """Repeat `step` while it raises `Unavailable`, at most 1 s apart. Blocks; for use at the start of a process.

    Raises:
        Unavailable: from the last try, `within_s` seconds after the first one.
    """
    deadline = time.monotonic() + within_s
    for delay in backoff(_MAX_BLOCKING_WAIT_S):
        try:
            return step()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(delay)
    raise AssertionError


async def retry_while_unavailable(
    step: Callable[[], Awaitable[T]], budget: RetryBudget = _PROCESS_BUDGET, *, within_s: float | None = None
) -> T:
    """Repeat `step` while it raises `Unavailable`, with full jitter and at most 10 s apart.

    Raises:
        Unavailable: from the last try, `within_s` seconds after the first one.
        TimeoutError: `within_s` seconds passed before the first try returned.
    """
    from services.core import telemetry  # noqa: PLC0415 - it loads Ray, which commands that use `backoff` do without

    last: Unavailable | None = None

    def count(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        telemetry.count_retry(error)
        log.log(
            logging.WARNING if state.attempt_number == 3 else logging.DEBUG,
            "a backend is unavailable; retry %d in %.1f s: %s",
            *(state.attempt_number, state.upcoming_sleep, error),
        )

    full_jitter = wait_random_exponential(multiplier=0.2, max=_MAX_WAIT_S)
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(Unavailable),
        wait=lambda state: max(full_jitter(state), budget.reserve()),
        before_sleep=count,
        sleep=asyncio.sleep,
        reraise=True,
    )

    # tenacity awaits coroutine functions only, not other callables that return an awaitable.
    async def attempt() -> T:
        nonlocal last
        try:
            return await step()
        except Unavailable as error:
            last = error
            raise

    deadline = asyncio.timeout(within_s)
    try:
        async with deadline:
            return await retrying(attempt)
    except TimeoutError:
        if last is None or not deadline.expired():
            raise
        raise last from None
