"""Chooses the policy of each labelled image: the evaluated version, with the categories that the row waives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipelines.evaluation.labels import LabelledImage, RejectedRecord, code_of
from pipelines.evaluation.metrics import NOTHING_WAIVED, OTHERS_WAIVED, VIOLATION_WAIVED
from services.core.calibration import CalibrationMap
from services.core.errors import ConfigurationError, UnknownPolicy
from services.core.values import CATEGORIES, NO_CATEGORY, Policy
from services.policies.document import CategoryRules, PolicyDocument
from services.policies.document_yaml import read_document_file
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry

_CODES: Final = frozenset(map(code_of, CATEGORIES))


@dataclass(frozen=True, slots=True)
class EvaluatedPolicy:
    """A policy version, or a document that is not published, with version 0."""

    document: PolicyDocument
    version: int
    calibrations: Mapping[str, CalibrationMap]

    @property
    def name(self) -> str:
        """Such as `default@3`."""
        return f"{self.document.name}@{self.version}" if self.version else f"{self.document.name} (not published)"

    @property
    def waived(self) -> frozenset[str]:
        """Codes of the categories that the policy itself waives."""
        return frozenset(code for code, rules in self.document.categories.items() if rules.mode == "waive")


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """The policy of one row, with both efforts."""

    full: Policy
    adaptive: Policy
    waiver_kind: int
    """NOTHING_WAIVED, OTHERS_WAIVED or VIOLATION_WAIVED."""
    category: str | None
    """The full name of the labelled category."""


class PolicySelector:
    """Selects the policy of each row. Each version is read once."""

    def __init__(self, evaluated: EvaluatedPolicy, registry: PolicyRegistry) -> None:
        self._evaluated = evaluated
        self._registry = registry
        self._versions: dict[str, EvaluatedPolicy | str] = {}
        self._policies: dict[tuple[str, frozenset[str]], tuple[Policy, Policy]] = {}

    def select(self, labelled: LabelledImage) -> RowPolicy | RejectedRecord:
        """The policy of a row, or why the row is rejected."""
        evaluated = self._find(labelled.policy) if labelled.policy else self._evaluated
        if isinstance(evaluated, str):
            return RejectedRecord(labelled.id, "unknown_policy", evaluated)
        own: dict[str, str] = {category.code: category.category for category in evaluated.document.own_categories}
        category = labelled.category
        if category and category != NO_CATEGORY and category not in CATEGORIES:
            category = own.get(category)
            if category is None:
                return RejectedRecord(
                    labelled.id, "unknown_category", f"its category {labelled.category} is not in {evaluated.name}"
                )
        if strange := labelled.waived - _CODES:
            return RejectedRecord(
                labelled.id, "unknown_policy", f"waives {min(strange)}, which is not a category of LlavaGuard"
            )
        waived = evaluated.waived | labelled.waived
        violated = category is not None and code_of(category) in waived
        if violated and labelled.rating == "Unsafe":
            return RejectedRecord(
                labelled.id, "contradiction", "is labelled Unsafe in a category that its policy waives"
            )
        waiver_kind = VIOLATION_WAIVED if violated else OTHERS_WAIVED if waived else NOTHING_WAIVED
        full, adaptive = self._build_policies(evaluated, waived)
        return RowPolicy(full, adaptive, waiver_kind, category)

    def _find(self, reference: str) -> EvaluatedPolicy | str:
        if reference not in self._versions:
            try:
                self._versions[reference] = find_published(reference, self._registry)
            except (UnknownPolicy, ConfigurationError) as error:
                self._versions[reference] = str(error)
        return self._versions[reference]

    def _build_policies(self, evaluated: EvaluatedPolicy, waived: frozenset[str]) -> tuple[Policy, Policy]:
        key = (evaluated.name, waived)
        if key not in self._policies:
            document = evaluated.document
            rules = dict(document.categories)
            for code in waived:
                rules[code] = rules.get(code, CategoryRules()).model_copy(update={"mode": "waive"})  # type: ignore[index, call-overload]

            def with_effort(effort: str) -> Policy:
                changed = document.model_copy(update={"effort": effort, "categories": rules})
                return replace(changed.as_version(evaluated.version), calibrations=dict(evaluated.calibrations))

            self._policies[key] = with_effort("full"), with_effort("adaptive")
        return self._policies[key]


def find_policy(reference: str, registry: PolicyRegistry) -> EvaluatedPolicy:
    """The policy that a command names: NAME for the active version, NAME@V, or the file of a document.

    Raises:
        ConfigurationError: the file cannot be read, or it is not a policy.
        UnknownPolicy: there is no such version.
    """
    if not reference.endswith((".yaml", ".yml")):
        return find_published(reference, registry)
    document = read_document_file(Path(reference))
    if not isinstance(document, PolicyDocument):
        raise ConfigurationError(f"{reference} is not a policy; name a document of kind policy")
    return EvaluatedPolicy(document, 0, {})


def find_published(reference: str, registry: PolicyRegistry) -> EvaluatedPolicy:
    """A published version, with the calibrations that are applied to its scores.

    Raises:
        UnknownPolicy: the reference is not well-formed, there is no such version, or none is active.
    """
    parsed = PolicyReference.parse(reference)
    stored, newest = registry.find(parsed), registry.find_newest_change(parsed.name)
    if not isinstance(stored.document, PolicyDocument):
        raise UnknownPolicy(f"{reference} is the tenants document, not a policy")
    calibrations = newest.rollout.get_calibrations(stored.version) if newest else {}
    return EvaluatedPolicy(stored.document, stored.version, calibrations)
