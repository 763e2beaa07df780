"""References to policies: one reader for every place that takes one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigurationError, UnknownPolicy
from services.policies.document import NAME_PATTERN
from services.policies.reference import PolicyReference


@given(st.from_regex(NAME_PATTERN.replace("$", r"\Z")), st.none() | st.integers(0, 99_999_999))
def test_written_reference_is_read_back(name: str, version: int | None) -> None:
    reference = PolicyReference(name, version)
    assert PolicyReference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text", ["", "@", "@1", "default@", "default@x", "default@-1", "default@\u0661", "default@1@2", "default@123456789"]
)
def test_reference_of_another_form_is_rejected(text: str) -> None:
    with pytest.raises(UnknownPolicy):
        PolicyReference.parse(text)


@pytest.mark.parametrize("name", ["No Name", "../x", "a" * 65, "-a", "a/b@1", "Default"])
def test_invalid_name_is_rejected(name: str) -> None:
    with pytest.raises(UnknownPolicy, match="is not a policy name"):
        PolicyReference.parse(name)


def test_reference_without_version_cannot_be_pinned() -> None:
    assert PolicyReference.parse("shop@3").require_version() == ("shop", 3)
    with pytest.raises(ConfigurationError, match="shop@V"):
        PolicyReference.parse("shop").require_version()
