"""What the thresholds make of an assessment."""

from hypothesis import given
from hypothesis import strategies as st

from services.contracts import CATEGORIES, NO_CATEGORY, Assessment
from services.moderation import decide
from services.policies.policy import PolicyDocument
from tests.scripted_guard import MODEL

POLICY = PolicyDocument.model_validate(
    {"name": "p", "thresholds": {"review": 0.4, "block": 0.8, "categories": {"O7": {"review": 0.1, "block": 0.2}}}}
).as_version(1)


@given(st.floats(0, 1), st.sampled_from([*CATEGORIES, NO_CATEGORY]))
def test_decide(score: float, category: str) -> None:
    assessment = Assessment(rating="Safe", category=category, rationale=None, score=score, model=MODEL)
    review, block = (0.1, 0.2) if category.startswith("O7") else (0.4, 0.8)
    expected = "block" if score >= block else "review" if score >= review else "allow"
    assert decide(assessment, POLICY) == expected
