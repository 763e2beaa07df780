"""Errors of Ray, reduced to one sentence."""

import pytest

from pipelines.clients.ray import deploy_failure_cause, own_error
from services.core.errors import ConfigurationError, SluiceError


def test_deploy_failure_with_own_error_names_it() -> None:
    error = ConfigurationError("SLUICE_MODEL=x is unknown; choose tiny")
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    messages = f"The replica failed:\nTraceback (most recent call last):\n  line 1\n{name}: {error}\nSee the logs."
    assert deploy_failure_cause(messages) == str(error)


@pytest.mark.parametrize(
    ("messages", "start"), [("first\n  no room \n", "no room (Ray's logs"), ("", "no reason given")]
)
def test_deploy_failure_of_ray_gives_last_line(messages: str, start: str) -> None:
    assert deploy_failure_cause(messages).startswith(start)


def test_own_error_is_found_among_causes() -> None:
    own = SluiceError("the guard failed")
    outer, inner = RuntimeError("outer"), RuntimeError("inner")
    outer.__cause__, inner.__cause__ = inner, own
    assert own_error(outer) is own
    assert own_error(RuntimeError("no cause")) is None
