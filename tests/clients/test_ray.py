"""Errors of Ray, reduced to one sentence."""

import pytest
from ray.exceptions import RayTaskError

from pipelines.clients.ray import explain_deploy_failure, explain_join_failure, find_own_error
from services.core.errors import ConfigurationError, SluiceError


def test_deploy_failure_with_find_own_error_names_it() -> None:
    error = ConfigurationError("SLUICE_MODEL=x is unknown; choose tiny")
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    messages = f"The replica failed:\nTraceback (most recent call last):\n  line 1\n{name}: {error}\nSee the logs."
    assert explain_deploy_failure(messages) == str(error)


@pytest.mark.parametrize(
    ("messages", "start"), [("first\n  no room \n", "no room (Ray's logs"), ("", "no reason given")]
)
def test_deploy_failure_of_ray_gives_last_line(messages: str, start: str) -> None:
    assert explain_deploy_failure(messages).startswith(start)


def test_find_own_error_is_found_among_causes() -> None:
    own = SluiceError("the guard failed")
    outer, inner = RuntimeError("outer"), RuntimeError("inner")
    outer.__cause__, inner.__cause__ = inner, own
    assert find_own_error(outer) is own
    assert find_own_error(RuntimeError("no cause")) is None


def test_find_own_error_of_a_failed_call_is_the_original_one() -> None:
    own = SluiceError("the guard failed")
    # What a caller gets: an instance of Ray's class and of the cause's class, with a traceback for its text.
    failed = RayTaskError("judge_under", "Traceback ...", own).as_instanceof_cause()
    assert isinstance(failed, SluiceError)
    assert find_own_error(failed) is own


def test_explain_join_failure_by_authentication_says_what_to_set() -> None:
    error = RuntimeError("could not connect")
    error.__cause__ = RuntimeError("AuthenticationError: another token")
    assert "set RAY_AUTH_MODE and RAY_AUTH_TOKEN" in explain_join_failure(error)


def test_explain_join_failure_by_another_cause_is_one_line() -> None:
    assert explain_join_failure(RuntimeError("no\n  route")) == "cannot be joined: no route"
