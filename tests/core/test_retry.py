"""Retries stay below a rate, and failures are limited while nothing succeeds."""

import asyncio
from itertools import count, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core import retry
from services.core.errors import NotFound, StoreUnavailable
from services.core.retry import RetryBudget, UnjudgedBudget, backoff, retry_blocking, retry_while_unavailable


class Clock:
    """A clock that only `sleep` advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    monotonic = __call__

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(st.lists(st.floats(0, 0.05), min_size=100, max_size=400))
def test_retry_budget_many_retries_are_spread_to_the_rate(gaps: list[float]) -> None:
    clock = Clock()
    budget = RetryBudget(per_s=10, burst=5, clock=clock)
    made = []
    for gap in gaps:
        clock.sleep(gap)
        made.append(clock.now + budget.reserve())
    for start in made:
        within = sum(start <= at < start + 1 for at in made)
        assert within <= 10 + 5 + 1, "more than the rate and the burst"


@given(st.lists(st.booleans(), max_size=2000))
def test_failure_budget_allows_small_share_and_none_without_success(succeeded: list[bool]) -> None:
    budget = UnjudgedBudget(per_success=0.02, burst=10)
    failures = successes = in_a_row = 0
    for success in succeeded:
        if success:
            budget.record_success()
            successes += 1
            in_a_row = 0
        elif budget.take():
            failures += 1
            in_a_row += 1
        assert failures <= successes * 0.02 + 1e-6
        assert in_a_row <= 10


async def test_retry_while_unavailable_retries_unavailable_and_raises_others() -> None:
    tries = 0

    async def unavailable_twice() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailable("S3 does not answer")
        return "answer"

    assert await retry_while_unavailable(unavailable_twice) == "answer"

    async def not_found() -> None:
        raise NotFound("no such object")

    with pytest.raises(NotFound):
        await retry_while_unavailable(not_found)


@given(st.floats(0.1, 60))
def test_backoff_doubles_up_to_the_maximum_with_jitter(max_s: float) -> None:
    ceilings = [min(max_s, 0.1 * 2**number) for number in range(16)]
    for delay, ceiling in zip(islice(backoff(max_s), 16), ceilings, strict=True):
        assert ceiling / 2 <= delay <= ceiling


async def test_retry_while_unavailable_after_deadline_raises_last_error() -> None:
    async def unavailable() -> None:
        raise StoreUnavailable("S3 does not answer")

    with pytest.raises(StoreUnavailable):
        await retry_while_unavailable(unavailable, within_s=0.01)


async def test_retry_while_unavailable_hanging_step_times_out() -> None:
    with pytest.raises(TimeoutError):
        await retry_while_unavailable(asyncio.Event().wait, within_s=0.01)


def test_retry_blocking_unavailable_until_deadline_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    tried_at: list[float] = []

    def unavailable() -> None:
        tried_at.append(clock.now)
        raise StoreUnavailable("S3 does not answer")

    with pytest.raises(StoreUnavailable):
        retry_blocking(unavailable, within_s=20)
    assert 20 < tried_at[-1] <= 21
    assert all(after - before <= 1 for before, after in pairwise(tried_at))


def test_retry_blocking_unavailable_at_first_returns_later_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "time", Clock())
    tries = count(1)

    def unavailable_twice() -> int:
        if (number := next(tries)) < 3:
            raise StoreUnavailable("S3 does not answer")
        return number

    assert retry_blocking(unavailable_twice, within_s=20) == 3
