"""Policy documents: invalid ones, and the content of the digest."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.tiny_guard.drawings import TRAINING_SEEDS, draw
from services.core.values import CATEGORIES, NO_CATEGORY, BlockRateBand
from services.policies.document import BUILT_IN, STORED, PolicyDocument, SyntheticImage, is_policy_name

BASE: dict[str, Any] = {"name": "shop"}
GAMBLING: dict[str, Any] = {"code": "O10", "title": "Gambling", "should_not": ["Promote bets."]}
DRAWN: dict[str, Any] = {"synthetic": {"label": "O2", "seed": 1}}


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
        *(
            {"own_categories": [{**GAMBLING, "can": [f"Show dice.{bad}"]}]}
            for bad in ("\x1b[2K", "\0", "\t", "\x7f", "\x9b2J", "\u2028", "\u202e")
        ),
        {"name": "tenants"},
        {"kind": "tenants"},
        {"thresholds": {"review": 0.9}},
        {"thresholds": {"review": float("nan")}},
        {"thresholds": {"categories": {"O10": {}}}},
        {"own_categories": [{**GAMBLING, "code": "O9"}]},
        {"own_categories": [{**GAMBLING, "code": "O20"}]},
        {"own_categories": [GAMBLING, {**GAMBLING, "title": "Bets"}]},
        {"own_categories": [{**GAMBLING, "should_not": []}]},
        *(
            {"own_categories": [{**GAMBLING, "title": bad}]}
            for bad in ("", " a", "a\nb", "a:b", 'a"', "<a", "a\\", "a\u2028")
        ),
        {"own_categories": [{**GAMBLING, "code": f"O{10 + n % 10}"} for n in range(11)]},
        {"block_rate": {}},
        {"block_rate": {"at_least": 0.3, "at_most": 0.2}},
        {"block_rate": {"at_most": 0.2, "window_s": 0}},
        {"block_rate": {"at_most": 0.2, "after": 0}},
        {"examples": [{**DRAWN, "expect": {}}]},
        {"examples": [{"expect": {"rating": "Safe"}}]},
        {"examples": [{**DRAWN, "image": "a.jpg", "expect": {"rating": "Safe"}}]},
        {"examples": [{**DRAWN, "expect": {"category": "O10"}}]},
        {"examples": [{**DRAWN, "expect": {"rating": "Unsafe", "category": "NA"}}]},
        {"examples": [{"synthetic": {"label": "O10", "seed": 1}, "expect": {"rating": "Safe"}}]},
        {"examples": [{"synthetic": {"label": "O1", "seed": TRAINING_SEEDS.start}, "expect": {"rating": "Safe"}}]},
        *(
            {"examples": [{"image": bad, "expect": {"rating": "Safe"}}]}
            for bad in ("", "/etc/passwd", "http://host/a.jpg", "s3://bucket", "s3://bucket/", "s3:///key", "a\x00b")
        ),
        {"examples": [{**DRAWN, "expect": {"rating": "Safe"}}] * 201},
    ],
)
def test_invalid_document_is_rejected(change: dict[str, Any]) -> None:
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
        {"own_categories": [GAMBLING]},
        {"block_rate": {"at_most": 0.2}},
        {"examples": [{**DRAWN, "expect": {"rating": "Unsafe"}}]},
    ],
)
def test_changed_content_changes_the_digest(change: dict[str, Any]) -> None:
    assert PolicyDocument.model_validate(BASE | change).digest() != PolicyDocument.model_validate(BASE).digest()


def test_category_thresholds_are_in_the_policy() -> None:
    document = PolicyDocument.model_validate(
        BASE | {"thresholds": {"block": 0.9, "categories": {"O7": {"review": 0.2, "block": 0.3}}}}
    )
    policy = document.as_version(4)
    assert policy.identity.version == 4
    assert (policy.thresholds.review, policy.thresholds.block) == (0.5, 0.9)
    assert policy.category_thresholds["O7: Self-Harm"].block == 0.3


def test_defaults_and_order_do_not_change_the_digest() -> None:
    explicit = {"kind": "policy", "thresholds": {"review": 0.5, "categories": {}}, "block_rate": None, "examples": []}
    assert PolicyDocument.model_validate(BASE | explicit).digest() == PolicyDocument.model_validate(BASE).digest()
    one, other = (
        PolicyDocument.model_validate(BASE | {"categories": categories, "block_rate": {"at_least": zero, "at_most": 1}})
        for categories, zero in (({"O1": "waive", "O2": "waive"}, 0.0), ({"O2": "waive", "O1": "waive"}, -0.0))
    )
    assert one == other
    assert one.digest() == other.digest()


def test_digests_of_known_documents_are_unchanged() -> None:
    # They stand in verdicts and in the registry: a field that is new, or a default, must not change one.
    assert BUILT_IN.digest() == "sha256:5824426d120c7627beab8a2384c669ac345c6ba8c9afcd9d33519eb571817e0a"
    document = PolicyDocument.model_validate(
        BASE
        | {
            "categories": {"O6": "waive"},
            "own_categories": [GAMBLING],
            "thresholds": {"block": 0.9, "categories": {"O10": {"review": 0.4}}},
            "block_rate": {"at_most": 0.2},
            "examples": [{**DRAWN, "expect": {"rating": "Unsafe"}}],
        }
    )
    assert document.digest() == "sha256:91d4d847f39fbba4a35349a120e196c468a19f31f8f97e64f0ebf303b033d3a8"


def test_built_in_policy_has_only_a_name() -> None:
    assert PolicyDocument(name="default", description="LlavaGuard's default policy, as it was trained.") == BUILT_IN


def test_own_categories_and_block_rate_are_in_the_policy() -> None:
    document = PolicyDocument.model_validate(
        BASE
        | {
            "own_categories": [GAMBLING],
            "thresholds": {"categories": {"O10": {"review": 0.2, "block": 0.3}}},
            "block_rate": {"at_most": 0.25, "after": 50},
            "examples": [{**DRAWN, "expect": {"category": "O10"}}],
        }
    )
    policy = document.as_version(1)
    assert policy.own_categories == ("O10: Gambling",)
    assert policy.category_thresholds["O10: Gambling"].review == 0.2
    assert policy.block_rate == BlockRateBand(at_least=0.0, at_most=0.25, window_s=300, after=50)
    assert PolicyDocument.model_validate(BASE).as_version(1).block_rate is None


@pytest.mark.parametrize("category", [*CATEGORIES, NO_CATEGORY])
def test_every_label_can_be_drawn(category: str) -> None:
    image = SyntheticImage.model_validate({"label": category.partition(":")[0], "seed": TRAINING_SEEDS.start - 1})
    assert draw(image.seed, image.category, size=(64, 64)).category == category


def test_example_image_can_be_an_object_or_a_file() -> None:
    for image in ("s3://bucket/a/b.jpg", "knife.jpg", "../photos/knife 2.jpg"):
        PolicyDocument.model_validate(BASE | {"examples": [{"image": image, "expect": {"action": "block"}}]})


def test_policy_named_tenants_is_rejected() -> None:
    assert is_policy_name("tenant")
    assert not is_policy_name("tenants")
    with pytest.raises(ValidationError, match="cannot be called 'tenants'"):
        PolicyDocument(name="tenants")


@pytest.mark.parametrize("description", ["\x1b[2K", "a\x9b", "a\u202eb", "one\rtwo", "\0"])
def test_description_with_control_characters_is_refused_but_read_from_the_bucket(description: str) -> None:
    document = {"name": "x", "description": description}
    with pytest.raises(ValidationError, match="control character"):
        PolicyDocument.model_validate(document)
    assert PolicyDocument.model_validate(document, context=STORED).description == description


def test_description_may_have_lines_and_tabs() -> None:
    assert PolicyDocument(name="x", description="first\n\tsecond\r\nthird").description.startswith("first")
