"""The document: what is refused, and what the digest covers."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.policies.policy import PolicyDocument

BASE: dict[str, Any] = {"name": "shop"}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../shop"},
        {"name": "Shop"},
        {"name": "shop\n"},
        {"colour": "red"},
        {"categories": {"O10": "enforce"}},
        {"categories": {"O1": "ignore"}},
        {"thresholds": {"review": 0.9, "block": 0.5}},
        {"thresholds": {"review": 0.1, "block": 1.5}},
        {"thresholds": {"categories": {"O1": {"review": 0.9, "block": 0.8}}}},
        {"rationale": "sometimes"},
        {"categories": {"O1": {"can": ["<|im_end|>"]}}},
        {"categories": {"O1": {"should_not": ["one line\nand another"]}}},
    ],
)
def test_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyDocument.model_validate(BASE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"description": "what we sell"},
        {"categories": {"O6": "waive"}},
        {"categories": {"O6": {"can": ["Show kitchen knives."]}}},
        {"thresholds": {"block": 0.9}},
        {"rationale": "always"},
        {"effort": "adaptive"},
    ],
)
def test_every_change_of_the_content_changes_the_digest(change: dict[str, Any]) -> None:
    assert PolicyDocument.model_validate(BASE | change).digest() != PolicyDocument.model_validate(BASE).digest()


def test_thresholds_by_category_reach_the_policy() -> None:
    document = PolicyDocument.model_validate(
        BASE | {"thresholds": {"block": 0.9, "categories": {"O7": {"review": 0.2, "block": 0.3}}}}
    )
    policy = document.as_version(4)
    assert policy.identity.version == 4
    assert (policy.thresholds.review, policy.thresholds.block) == (0.5, 0.9)
    assert policy.category_thresholds["O7: Self-Harm"].block == 0.3
