"""The policy document: what people write, and the value that the guard judges by."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import to_json

from services.contracts import CATEGORIES, EffortMode, Policy, PolicyIdentity, RationaleMode, Thresholds
from services.policies.prompt import TRAINED_BLOCKS, Block, render

CategoryCode = Literal["O1", "O2", "O3", "O4", "O5", "O6", "O7", "O8", "O9"]
Probability = Annotated[float, Field(ge=0, le=1)]
Rule = Annotated[str, Field(pattern=r"^[^<>\r\n]+$", max_length=1000)]
"""One line; without angle brackets, which could be taken for a marker of a model's chat layout."""
Rules = Annotated[tuple[Rule, ...], Field(max_length=50)]
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,63}$"

_CATEGORY_BY_CODE: Final[Mapping[str, str]] = {category.partition(":")[0]: category for category in CATEGORIES}


def is_policy_name(name: str) -> bool:
    """Whether a policy may be called so: it becomes a part of object keys."""
    return re.fullmatch(NAME_PATTERN, name) is not None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CategoryRules(_Part):
    """What a policy says about one category; rules that are not given are the trained ones."""

    mode: Literal["enforce", "waive"] = "enforce"
    should_not: Rules | None = None
    can: Rules | None = None


class ThresholdPair(_Part):
    """Scores from which an image is reviewed, and blocked."""

    review: Probability = 0.5
    block: Probability = 0.8

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.review > self.block:
            raise ValueError(f"review ({self.review}) is above block ({self.block})")
        return self


class ThresholdRules(ThresholdPair):
    """The thresholds of a policy, with overrides by category."""

    categories: dict[CategoryCode, ThresholdPair] = Field(default_factory=dict)


class PolicyDocument(_Part):
    """A policy as it is written. Equal documents make equal prompts and have equal digests."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: Annotated[str, Field(max_length=2000)] = ""
    categories: dict[CategoryCode, CategoryRules] = Field(default_factory=dict)
    thresholds: ThresholdRules = ThresholdRules()
    rationale: RationaleMode = "unsafe"
    effort: EffortMode = "full"
    first_look_below: Annotated[
        Probability, Field(description="effort adaptive: a first look with a lower score is accepted as Safe")
    ] = 0.1

    @field_validator("categories", mode="before")
    @classmethod
    def _expand_modes(cls, categories: Any) -> Any:
        if not isinstance(categories, dict):
            return categories
        return {code: {"mode": rules} if isinstance(rules, str) else rules for code, rules in categories.items()}

    def prompt(self) -> str:
        """The prompt text that this policy makes."""
        return render([self._block(trained) for trained in TRAINED_BLOCKS])

    def digest(self) -> str:
        """`sha256:<hex>` of the canonical content and of the prompt that it makes."""
        canonical = to_json({"content": self.model_dump(mode="json"), "prompt": self.prompt()})
        return f"sha256:{hashlib.sha256(canonical).hexdigest()}"

    def as_version(self, version: int) -> Policy:
        """The value to judge by, once the registry has given the document a version."""
        thresholds = self.thresholds
        return Policy(
            identity=PolicyIdentity(name=self.name, version=version, digest=self.digest()),
            prompt=self.prompt(),
            thresholds=Thresholds(thresholds.review, thresholds.block),
            category_thresholds=MappingProxyType(
                {
                    _CATEGORY_BY_CODE[code]: Thresholds(pair.review, pair.block)
                    for code, pair in thresholds.categories.items()
                }
            ),
            rationale=self.rationale,
            effort=self.effort,
            first_look_below=self.first_look_below,
        )

    def _block(self, trained: Block) -> Block:
        rules = self.categories.get(trained.category.partition(":")[0])  # type: ignore[call-overload]
        if rules is None:
            return trained
        return replace(
            trained,
            should_not=trained.should_not if rules.should_not is None else rules.should_not,
            can=trained.can if rules.can is None else rules.can,
            waived=rules.mode == "waive",
        )


BUILT_IN: Final = PolicyDocument(name="default", description="LlavaGuard's default policy, as it was trained.")
"""Published and activated as `default@1` by `sluice up` when the policy bucket is empty."""
