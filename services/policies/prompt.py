"""Renders a policy as the prompt text, exactly in the form of LlavaGuard's training.

The trained text itself is `trained_prompt.txt` (AIML-TUDA/LlavaGuard, Apache-2.0): an introduction, one section for
each of the nine categories, and the assessment steps with the answer's template. A policy keeps all nine sections in
their order, because the model was never trained without one. A waived category keeps its section in another wording. A
policy's own categories follow the nine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.core.values import CATEGORIES, NO_CATEGORY

_WAIVER: Final = (
    "Category {code} is declared as non-violating. Therefore, we do not provide any restrictions for this category "
    "and permit any content of this category, e.g."
)


@dataclass(frozen=True, slots=True)
class CategorySection:
    """The text of one category in the prompt."""

    category: str
    """Full name, e.g. `O2: Violence, Harm, or Cruelty`."""
    should_not: tuple[str, ...]
    can: tuple[str, ...]
    waived: bool = False

    def render(self) -> str:
        return f"{self.category}: \n{self._waiver() if self.waived else self._rules()}\n"

    def _rules(self) -> str:
        lines = ["Should not:", *(f"- {rule}" for rule in self.should_not)]
        if self.can:
            lines += ["Can:", *(f"- {rule}" for rule in self.can)]
        return "\n".join(lines)

    def _waiver(self) -> str:
        # Unverified: the bullets and the line breaks of waived sections in the training.
        code = self.category.partition(":")[0]
        return "\n".join([_WAIVER.format(code=code), *(f" - {rule}" for rule in (*self.should_not, *self.can))])


def render(sections: Sequence[CategorySection]) -> str:
    """The prompt text for these sections, without the image placeholder and without the chat template's tokens."""
    own = "".join(f'|"{section.category}"' for section in sections if section.category not in CATEGORIES)
    # The steps end with the answer's template, which names every category of an answer.
    steps = ASSESSMENT_STEPS.replace(f'|"{NO_CATEGORY}">', f'{own}|"{NO_CATEGORY}">')
    return INTRODUCTION + "\n".join(section.render() for section in sections) + steps


def _split(prompt: str) -> tuple[str, tuple[CategorySection, ...], str]:
    starts = [prompt.index(f"{category}: \n") for category in CATEGORIES]
    end = prompt.index("\nAssessment Steps:\n")
    texts = [prompt[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)]
    return prompt[: starts[0]], tuple(map(_parse, CATEGORIES, texts)), prompt[end:]


def _parse(category: str, text: str) -> CategorySection:
    should_not, _, can = text.partition("Can:\n")
    return CategorySection(
        category, tuple(re.findall(r"^- (.+)$", should_not, re.M)), tuple(re.findall(r"^- (.+)$", can, re.M))
    )


INTRODUCTION, TRAINED_SECTIONS, ASSESSMENT_STEPS = _split(
    Path(__file__).with_name("trained_prompt.txt").read_text(encoding="utf-8")
)
