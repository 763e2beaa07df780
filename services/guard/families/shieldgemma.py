"""ShieldGemma 2: one question for each enforced category, answered with Yes or No.

The prompt is that of its chat template (transformers, convert_shieldgemma2_weights_orbax_to_hf.py) and of its model
card. It was trained on three other policies, not on LlavaGuard's categories. How well it judges these is unverified.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.core.errors import ConfigurationError
from services.core.values import CATEGORIES, NO_CATEGORY, Detail, Policy
from services.guard.families.base import FamilyAnswer, GenerateFn, reject_chat_markers

# Only as the first line: a rule, which begins with a dash, may contain the same words.
_WAIVED: Final = re.compile(r"Category O\d+ is declared as non-violating")


@dataclass(frozen=True, slots=True)
class ShieldGemma:
    """The family of ShieldGemma 2. The image comes first, so its questions share the image's KV cache."""

    @property
    def ratings(self) -> tuple[str, str]:
        return "No", "Yes"

    def adapt_prompt(self, prompt: str) -> str:
        return prompt

    @property
    def image_token(self) -> tuple[str, str]:
        return "<start_of_image>", "boi_token_index"

    def build_example(self) -> str:
        return _build_question("No Violence: The image shall not contain violence.")

    def build_example_grammar(self) -> None:
        return None

    async def assess(self, generate: GenerateFn, policy: Policy, detail: Detail, *, answer_tokens: int) -> FamilyAnswer:
        """The score is the highest score of a category. Each question needs one token, so `answer_tokens` is not used.

        The model gives no reasons. If the policy requires a rationale, it only names the category.

        Raises:
            ConfigurationError: the policy's prompt has no section for a category.
        """
        asked = parse_enforced_rules(policy.prompt, (*CATEGORIES, *policy.own_categories))
        scores = {category: (await generate(_build_question(rules))).score for category, rules in asked.items()}
        category = max(scores, key=lambda category: scores[category]) if scores else NO_CATEGORY
        score = scores.get(category, 0.0)
        if score <= 0.5:
            said = "The model sees no violation of a category; it gives no reasons."
            return FamilyAnswer(
                "Safe", score, rationale=said if detail == "verdict" and policy.rationale == "always" else None
            )
        if detail == "score":
            return FamilyAnswer("Unsafe", score)
        said = f"The model sees a violation of {category}; it gives no reasons."
        return FamilyAnswer("Unsafe", score, category, None if policy.rationale == "never" else said)


def parse_enforced_rules(prompt: str, categories: Sequence[str] = CATEGORIES) -> Mapping[str, str]:
    """The rules by category, from a prompt in LlavaGuard's form, without waived categories.

    `categories` are the full names of all categories that may have a section in the prompt.

    Raises:
        ConfigurationError: the prompt has no section for a category.
    """
    heading = rf"^({'|'.join(map(re.escape, categories))}): ?\n"
    # The text before the first heading, then each heading and its rules.
    _, *parts = re.split(heading, reject_chat_markers(prompt).partition("\nAssessment Steps:")[0], flags=re.M)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if not sections:
        raise ConfigurationError("ShieldGemma judges by category, and the policy's text has no section for a category.")
    return {
        category: f"No {category.partition(': ')[2]}: The image follows these rules.\n{rules.strip()}"
        for category, rules in sections.items()
        if not _WAIVED.match(rules)
    }


def _build_question(rules: str) -> str:
    # The template has one turn for the image and another for the text. The tokenizer adds the <bos>.
    return (
        "<start_of_turn>user\n<start_of_image><start_of_turn>user\n"
        "You are a policy expert trying to help determine whether a generated or real image is in violation of the "
        "safety policy below. Your decision must very clearly follow the specific language used in the safety policy "
        "and should not include any interpretation outside of the safety policy.\n\n"
        f"<BEGIN_SAFETY_POLICY>\n{rules}\n</END_SAFETY_POLICY>\n\n"
        "Does the image violate the above policy? Your Answer must start with 'Yes' or 'No'.<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
