"""Retries do not multiply an outage, and an outage does not empty a stream into the dead letters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import NotFound, StoreUnavailable
from services.core.retry import FailureBudget, RetryBudget, retry_while_unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 0.05), min_size=100, max_size=400))
def test_retries_are_spread_to_the_rate(gaps: list[float]) -> None:
    clock = Clock()
    budget = RetryBudget(per_s=10, at_once=5, clock=clock)
    made = []
    for gap in gaps:
        clock.now += gap
        made.append(clock.now + budget.wait_s())
    for start in made:
        within = sum(start <= at < start + 1 for at in made)
        assert within <= 10 + 5 + 1, "the rate, and what was saved"


@given(st.lists(st.booleans(), max_size=2000))
def test_give_ups_are_a_small_share_and_none_without_success(succeeded: list[bool]) -> None:
    give_ups = FailureBudget(per_success=0.02, at_once=10)
    given_up = successes = in_a_row = 0
    for success in succeeded:
        if success:
            give_ups.succeeded()
            successes += 1
            in_a_row = 0
        elif give_ups.take():
            given_up += 1
            in_a_row += 1
        assert given_up <= successes * 0.02 + 1e-6
        assert in_a_row <= 10


async def test_what_is_away_is_waited_for_and_what_never_comes_is_not() -> None:
    tries = 0

    async def away_twice() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailable("away")
        return "here"

    assert await retry_while_unavailable(away_twice) == "here"

    async def gone() -> None:
        raise NotFound("gone")

    with pytest.raises(NotFound):
        await retry_while_unavailable(gone)
