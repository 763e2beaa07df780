"""Warns about the parts of a policy document that LlavaGuard was not trained for."""

from typing import Final

from services.policies.prompt import TRAINED_SECTIONS
from services.policies.tenants import Document, TenantsDocument

_TRAINED_WAIVERS_LIMIT: Final = 3
"""The most waived categories in one training example of LlavaGuard v1.2."""


def find_warnings(document: Document) -> list[str]:
    """Return a sentence for each part of a document that LlavaGuard was not trained for. Such parts are allowed."""
    if isinstance(document, TenantsDocument):
        return []
    waived = [code for code, rules in document.categories.items() if rules.mode == "waive"]
    found = []
    if len(waived) > _TRAINED_WAIVERS_LIMIT:
        found.append(
            f"{len(waived)} categories are waived ({', '.join(waived)}): the model was trained with at most "
            f"{_TRAINED_WAIVERS_LIMIT}, and may ignore some of them."
        )
    if waived:
        found.append(
            f"The wording that waives {', '.join(waived)} is not verified against the model's training: add examples "
            "that check whether the model obeys it."
        )
    trained = {section.category.partition(":")[0]: section for section in TRAINED_SECTIONS}
    for code, rules in document.categories.items():
        section = trained[code]
        changed = [
            name
            for name, own, learned in (
                ("should_not", rules.should_not, section.should_not),
                ("can", rules.can, section.can),
            )
            if own not in (None, learned)
        ]
        if changed:
            found.append(
                f"categories.{code}: the wording of {' and '.join(changed)} is not that of the model's training."
            )
        if rules.should_not == () and rules.mode == "enforce":
            found.append(
                f"categories.{code}: should_not has no rule, so nothing violates the category; add a rule or waive it."
            )
    if document.own_categories:
        names = ", ".join(own.category for own in document.own_categories)
        found.append(f"The model was trained only on its nine categories, not on {names}.")
    return found
