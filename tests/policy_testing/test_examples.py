"""Whether an example came out as expected."""

from typing import Any

import pytest

from pipelines.policy_testing.examples import name_of, problem
from services.core.errors import GuardFailed, NotFound
from services.policies.document import Example, Expectation
from tests.policy_testing.test_rejudge import changed


def expect(**fields: Any) -> Expectation:
    return Expectation.model_validate(fields)


@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        (expect(rating="Unsafe"), False),
        (expect(category="O2"), False),
        (expect(action="block"), False),
        (expect(rating="Unsafe", category="O2", action="block"), False),
        (expect(rating="Safe"), True),
        (expect(category="O6"), True),
        (expect(category="NA"), True),
        (expect(rating="Unsafe", category="O2", action="review"), True),
    ],
)
def test_an_example(expected: Expectation, wrong: bool) -> None:
    assert (problem(expected, [changed()]) is not None) == wrong


def test_nothing_is_a_category_too() -> None:
    harmless = changed(rating="Safe", category="NA: None applying", rationale=None, score=0.01, action="allow")
    assert problem(expect(category="NA", action="allow"), [harmless]) is None


def test_says_what_came_instead() -> None:
    assert problem(expect(rating="Safe", action="allow"), [changed()]) == (
        "expected Safe, allow; came Unsafe, O2: Violence, Harm, or Cruelty, block (score 0.97)"
    )
    unreadable = changed(outcome="needs_review", rating=None, category=None, score=None, action="review")
    assert problem(expect(rating="Safe"), [unreadable]) == "expected Safe; the guard's answer could not be read"
    assert problem(expect(action="review"), [unreadable]) is None
    assert problem(expect(rating="Safe"), NotFound("no such key")) == "it cannot be judged (not_found): no such key"
    assert problem(expect(rating="Safe"), [GuardFailed("no")]) == "it cannot be judged (guard_failed): no"


def test_names() -> None:
    drawn: dict[str, Any] = {"synthetic": {"label": "O2", "seed": 7}, "expect": {"rating": "Safe"}}
    assert name_of(Example.model_validate(drawn)) == "synthetic O2, seed 7"
    assert name_of(Example.model_validate(drawn | {"name": "a knife"})) == "a knife"
    file = Example.model_validate({"image": "pictures/a.jpg", "expect": {"rating": "Safe"}})
    assert name_of(file) == "pictures/a.jpg"
