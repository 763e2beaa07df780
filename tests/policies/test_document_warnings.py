"""Warnings about documents that differ from the training of LlavaGuard."""

from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.document_warnings import find_warnings
from services.policies.prompt import TRAINED_SECTIONS
from services.policies.tenants import TenantsDocument


def test_default_policy_has_no_warnings() -> None:
    assert find_warnings(BUILT_IN) == []
    assert find_warnings(TenantsDocument(tenants={"a": "shop"})) == []


def test_more_waivers_than_in_training_are_warned_about() -> None:
    def waiving(count: int) -> PolicyDocument:
        return PolicyDocument.model_validate({"name": "x", "categories": {f"O{n + 1}": "waive" for n in range(count)}})

    assert not any("are waived" in warning for warning in find_warnings(waiving(3)))
    assert "4 categories are waived (O1, O2, O3, O4)" in find_warnings(waiving(4))[0]
    assert any("O1, O2, O3 is not verified" in warning for warning in find_warnings(waiving(3)))


def test_own_wording_is_warned_about() -> None:
    trained = TRAINED_SECTIONS[0]
    categories = {
        "O1": {"should_not": trained.should_not, "can": trained.can},
        "O2": {"can": ["Joke."]},
        "O3": {"should_not": []},
    }
    found = find_warnings(PolicyDocument.model_validate({"name": "x", "categories": categories}))
    assert [warning.partition(":")[0] for warning in found] == ["categories.O2", "categories.O3", "categories.O3"]


def test_own_categories_are_warned_about() -> None:
    own = [{"code": "O10", "title": "Gambling", "should_not": ["Bet."]}]
    (warning,) = find_warnings(PolicyDocument.model_validate({"name": "x", "own_categories": own}))
    assert "O10: Gambling" in warning
