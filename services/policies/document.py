"""The policy document that people write, and its conversion to the policy that the guard uses."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from services.core.s3_uri import parse_s3_uri
from services.core.text import require_one_line
from services.core.values import (
    CATEGORIES,
    NO_CATEGORY,
    TENANTS,
    Action,
    BlockRateBand,
    EffortMode,
    Policy,
    PolicyIdentity,
    Rating,
    RationaleMode,
    Thresholds,
)
from services.policies.prompt import TRAINED_SECTIONS, CategorySection, render

CategoryCode = Literal["O1", "O2", "O3", "O4", "O5", "O6", "O7", "O8", "O9"]
OwnCode = Literal["O10", "O11", "O12", "O13", "O14", "O15", "O16", "O17", "O18", "O19"]
AnyCode = Literal[CategoryCode, OwnCode]
CodeOrNone = Literal[CategoryCode, OwnCode, "NA"]
Probability = Annotated[float, Field(ge=0, le=1), AfterValidator(lambda share: share + 0.0)]
"""In [0, 1]. -0.0 becomes 0.0, so that equal documents have equal digests."""


def _check_rule(rule: str, info: ValidationInfo) -> str:
    return rule if info.context == STORED else require_one_line(rule)


def _check_description(description: str, info: ValidationInfo) -> str:
    if info.context != STORED:
        for line in description.replace("\t", " ").replace("\r\n", "\n").split("\n"):
            require_one_line(line)
    return description


STORED: Final = "stored"
"""The context of the validation of a stored version. Earlier releases accepted control characters in texts."""
Rule = Annotated[str, Field(pattern=r"^[^<>\r\n]+$", max_length=1000), AfterValidator(_check_rule)]
"""One line without control characters and without angle brackets, which could be a marker of a chat layout."""
Rules = Annotated[tuple[Rule, ...], Field(max_length=50)]
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,63}$"

_FIRST_TRAINING_SEED: Final = (
    1_000_000_000  # pipelines.tiny_guard.drawings.TRAINING_SEEDS, without importing NumPy and Pillow
)
_NAME_BY_CODE: Final[Mapping[str, str]] = {
    category.partition(":")[0]: category for category in (*CATEGORIES, NO_CATEGORY)
}


def is_policy_name(name: str) -> bool:
    """Whether a policy may have this name, which becomes a part of object keys."""
    return re.fullmatch(NAME_PATTERN, name) is not None and name != TENANTS


def _reject_tenants(name: str) -> str:
    if name == TENANTS:
        raise ValueError(
            f"a policy cannot be called {TENANTS!r}: this is the name of the document that assigns policies to tenants "
            f"(kind: {TENANTS}); give the policy another name"
        )
    return name


PolicyName = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_reject_tenants)]


class ConflictingFields(ValueError):
    """Two parts of a document contradict each other."""

    def __init__(self, at: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.at = at
        """The place, as a path from the validated field."""


class StrictModel(BaseModel):
    """A part of a document: immutable, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CategoryRules(StrictModel):
    """The rules of one category. Omitted rules are those of the training."""

    mode: Annotated[
        Literal["enforce", "waive"],
        Field(
            description="`waive` permits the category: such an image is rated Safe, and the verdict names the category"
        ),
    ] = "enforce"
    should_not: Annotated[
        Rules | None, Field(description="replaces the trained list of what an image must not show")
    ] = None
    can: Annotated[Rules | None, Field(description="replaces the trained list of what an image may show")] = None


class OwnCategory(StrictModel):
    """A category that LlavaGuard was not trained on."""

    code: Annotated[OwnCode, Field(description="code of the category, used once")]
    title: Annotated[str, Field(min_length=1, max_length=60, description='name of the category; without `< > " : \\`')]
    should_not: Annotated[Rules, Field(min_length=1, description="what an image must not show")]
    can: Annotated[Rules, Field(description="what an image may show")] = ()

    @field_validator("title")
    @classmethod
    def _check_title(cls, title: str) -> str:
        # The title is in the prompt's JSON template, in the heading of a section, and in answers.
        if title != title.strip() or not title.isprintable() or set(title) & set('<>":\\'):
            raise ValueError('must be one line of text without < > " : \\ and without spaces around it')
        return title

    @property
    def category(self) -> str:
        """Full name, e.g. `O10: Gambling`."""
        return f"{self.code}: {self.title}"


def _check_order(info: ValidationInfo, lower: str, value: float) -> float:
    if (bound := info.data.get(lower, 0)) > value:
        raise ValueError(f"{info.field_name} ({value:g}) is below {lower} ({bound:g}); set it to at least {bound:g}")
    return value


class ThresholdPair(StrictModel):
    """The lowest scores for a review and for a block."""

    review: Annotated[Probability, Field(description="lowest score at which a person reviews the image")] = 0.5
    block: Annotated[
        Probability,
        Field(validate_default=True, description="lowest score at which the image is blocked; at least `review`"),
    ] = 0.8

    @field_validator("block")
    @classmethod
    def _check_block(cls, block: float, info: ValidationInfo) -> float:
        return _check_order(info, "review", block)


class ThresholdRules(ThresholdPair):
    """The thresholds of a policy, with overrides by category."""

    categories: dict[AnyCode, ThresholdPair] = Field(
        default_factory=dict,
        description="thresholds of single categories; omitted ones are 0.5 and 0.8, not those of the policy",
    )


class BlockRateRules(StrictModel):
    """The allowed band of the share of blocked images."""

    at_least: Annotated[Probability, Field(description="lowest allowed share of blocks")] = 0.0
    at_most: Annotated[Probability, Field(description="highest allowed share of blocks; at least `at_least`")]
    window_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="length in seconds of the sliding window in which verdicts are counted"),
    ] = 300
    after: Annotated[
        int,
        Field(
            ge=1, le=1_000_000, description="minimum number of verdicts in the window before the circuit breaker opens"
        ),
    ] = 100

    @field_validator("at_most")
    @classmethod
    def _check_at_most(cls, at_most: float, info: ValidationInfo) -> float:
        return _check_order(info, "at_least", at_most)

    def as_band(self) -> BlockRateBand:
        return BlockRateBand(self.at_least, self.at_most, self.window_s, self.after)


class SyntheticImage(StrictModel):
    """A drawn image (pipelines.tiny_guard.drawings), which is not stored."""

    label: Annotated[
        Literal[CategoryCode, "NA"],
        Field(description="the category that the image shows, or `NA` for a harmless image"),
    ]
    seed: Annotated[
        int,
        Field(ge=0, description="number of the drawing; below 1,000,000,000, because `tiny` was trained on the others"),
    ]

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, seed: int) -> int:
        if seed >= _FIRST_TRAINING_SEED:
            raise ValueError(
                f"must be below {_FIRST_TRAINING_SEED:_}: `tiny` was trained on the images from this seed on"
            )
        return seed

    @property
    def category(self) -> str:
        """Full name, as `pipelines.tiny_guard.drawings.draw` takes it."""
        return _NAME_BY_CODE[self.label]


class Expectation(StrictModel):
    """The expected verdict. Omitted fields may have any value."""

    rating: Annotated[Rating | None, Field(description="expected rating")] = None
    category: Annotated[CodeOrNone | None, Field(description="code of the expected category, or `NA` for none")] = None
    action: Annotated[Action | None, Field(description="expected action")] = None

    @model_validator(mode="after")
    def _check_expectation(self) -> Self:
        if self.rating is None and self.category is None and self.action is None:
            raise ValueError("expects nothing; give at least one of rating, category and action")
        if self.rating == "Unsafe" and self.category == "NA":
            raise ConflictingFields(("category",), "an Unsafe image has a category; NA goes with Safe only")
        return self


class Example(StrictModel):
    """A test of the policy: an image and the expected verdict."""

    name: Annotated[str | None, Field(min_length=1, max_length=200, description="name of the test, one line")] = None
    image: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=2048,
            description="`s3://bucket/key`, or a path relative to the document's folder; either `image` or `synthetic`",
        ),
    ] = None
    synthetic: Annotated[
        SyntheticImage | None, Field(description="an image that is drawn for the checkpoint `tiny`")
    ] = None
    expect: Annotated[Expectation, Field(description="the expected verdict; give at least one field")]

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not name.isprintable():
            raise ValueError("must be one line of text")
        return name

    @field_validator("image")
    @classmethod
    def _check_image(cls, image: str | None) -> str | None:
        if image is None:
            return None
        is_path = "://" not in image and not image.startswith("/")
        if not image.isprintable() or not (is_path or _is_object_uri(image)):
            raise ValueError("must be s3://bucket/key or a file's path, relative to the folder of the document")
        return image

    @model_validator(mode="after")
    def _check_one_image(self) -> Self:
        if (self.image is None) == (self.synthetic is None):
            raise ValueError("needs one image: either `image` or `synthetic`")
        return self


class PolicyDocument(StrictModel):
    """A policy as people write it. Equal documents have equal prompts and equal digests."""

    # A default must never change. Digests leave defaults out (see `compute_digest`), so the digest in an old verdict
    # would stand for another policy. The default of a new field has to describe the behaviour before the field.
    kind: Annotated[Literal["policy"], Field(description="kind of the document")] = "policy"
    name: Annotated[
        PolicyName,
        Field(description="at most 64 lower-case letters, digits, `-` and `_`; the first is a letter or digit"),
    ]
    description: Annotated[
        str,
        Field(max_length=2000, description="for people; the model does not see it"),
        AfterValidator(_check_description),
    ] = ""
    categories: dict[CategoryCode, CategoryRules] = Field(
        default_factory=dict,
        description="rules of LlavaGuard's nine categories; omitted categories are enforced with the trained rules; "
        "`O6: waive` is short for `O6: {mode: waive}`",
    )
    own_categories: Annotated[
        tuple[OwnCategory, ...],
        Field(max_length=10, description="categories that LlavaGuard was not trained on; add examples for each"),
    ] = ()
    thresholds: Annotated[ThresholdRules, Field(description="the scores at which an image is reviewed or blocked")] = (
        ThresholdRules()
    )
    rationale: Annotated[
        RationaleMode,
        Field(description="which verdicts have a rationale; such an answer takes about four times as many tokens"),
    ] = "unsafe"
    effort: Annotated[
        EffortMode,
        Field(
            description="`full` judges every image in full; `adaptive` takes a first look at a small image, which may "
            "accept a clearly safe one"
        ),
    ] = "full"
    first_look_below: Annotated[
        Probability,
        Field(
            description="with `effort: adaptive`, a first look with a lower score is accepted as Safe; its verdict has "
            "the category `NA: None applying` and no rationale"
        ),
    ] = 0.1
    block_rate: Annotated[
        BlockRateRules | None,
        Field(
            description="the allowed share of blocks; outside of it the circuit breaker opens. Omitted: there is none"
        ),
    ] = None
    examples: Annotated[
        tuple[Example, ...],
        Field(max_length=200, description="tests of the policy, for `sluice policy check --examples`"),
    ] = ()

    @field_validator("categories", mode="before")
    @classmethod
    def _expand_modes(cls, categories: Any) -> Any:
        if not isinstance(categories, dict):
            return categories
        return {code: {"mode": rules} if isinstance(rules, str) else rules for code, rules in categories.items()}

    @field_validator("own_categories")
    @classmethod
    def _check_own_codes(cls, own: tuple[OwnCategory, ...]) -> tuple[OwnCategory, ...]:
        codes = [category.code for category in own]
        for index, code in enumerate(codes):
            if code in codes[:index]:
                raise ConflictingFields((index, "code"), f"another category of this policy has the code {code}")
        return own

    @field_validator("thresholds")
    @classmethod
    def _check_threshold_codes(cls, thresholds: ThresholdRules, info: ValidationInfo) -> ThresholdRules:
        for code in thresholds.categories:
            if not _is_declared(code, info):
                raise ConflictingFields(("categories", code), _undeclared_message(code))
        return thresholds

    @field_validator("examples")
    @classmethod
    def _check_example_codes(cls, examples: tuple[Example, ...], info: ValidationInfo) -> tuple[Example, ...]:
        for index, example in enumerate(examples):
            code = example.expect.category
            if code is not None and not _is_declared(code, info):
                raise ConflictingFields((index, "expect", "category"), _undeclared_message(code))
        return examples

    def prompt(self) -> str:
        """The prompt text of this policy."""
        own = (
            CategorySection(category.category, category.should_not, category.can) for category in self.own_categories
        )
        return render([*map(self._make_section, TRAINED_SECTIONS), *own])

    def digest(self) -> str:
        """`sha256:<hex>` of the document's content and of its prompt."""
        return compute_digest(self, prompt=self.prompt())

    def as_version(self, version: int) -> Policy:
        """The policy for the guard, with the version that the registry has given to the document."""
        thresholds = self.thresholds
        names: dict[str, str] = {**_NAME_BY_CODE, **{own.code: own.category for own in self.own_categories}}
        return Policy(
            identity=PolicyIdentity(name=self.name, version=version, digest=self.digest()),
            prompt=self.prompt(),
            thresholds=Thresholds(thresholds.review, thresholds.block),
            category_thresholds=MappingProxyType(
                {names[code]: Thresholds(pair.review, pair.block) for code, pair in thresholds.categories.items()}
            ),
            rationale=self.rationale,
            effort=self.effort,
            first_look_below=self.first_look_below,
            own_categories=tuple(own.category for own in self.own_categories),
            block_rate=self.block_rate.as_band() if self.block_rate else None,
        )

    def _make_section(self, trained: CategorySection) -> CategorySection:
        rules = self.categories.get(trained.category.partition(":")[0])  # type: ignore[call-overload]
        if rules is None:
            return trained
        return replace(
            trained,
            should_not=trained.should_not if rules.should_not is None else rules.should_not,
            can=trained.can if rules.can is None else rules.can,
            waived=rules.mode == "waive",
        )


def compute_digest(document: BaseModel, **made: str) -> str:
    """`sha256:<hex>` of a document's content, and of the values `made` from it.

    Only values that differ from the defaults count, in a fixed order. So a field that a later release adds does not
    change the digests of documents without it. A changed default would silently change the meaning of a digest, so
    defaults must never change.
    """
    content = document.model_dump(mode="json", exclude_defaults=True)
    canonical = json.dumps({"content": content, **made}, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _is_declared(code: str, info: ValidationInfo) -> bool:
    own = info.data.get("own_categories")
    # Invalid own categories already have an issue.
    return code in _NAME_BY_CODE or own is None or code in {category.code for category in own}


def _undeclared_message(code: str) -> str:
    return f"{code} is not one of LlavaGuard's categories, and the policy does not declare it under own_categories"


BUILT_IN: Final = PolicyDocument.model_validate(
    yaml.safe_load((Path(__file__).parent / "documents" / "default.yaml").read_text(encoding="utf-8"))
)
"""Published and activated as `default@1` by `sluice up` when the policy bucket is empty."""


def _is_object_uri(uri: str) -> bool:
    try:
        _, key = parse_s3_uri(uri)
    except ValueError:
        return False
    return bool(key)
