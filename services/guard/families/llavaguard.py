"""LlavaGuard and QwenGuard: one question, one JSON answer with rating, category and rationale."""

import logging
from dataclasses import dataclass

from services.core.values import CATEGORIES, Detail, Policy, Rating
from services.guard.families.base import FamilyScores, GenerateFn
from services.guard.families.llavaguard_answer import (
    ANSWER_START,
    Layout,
    Wording,
    adapt_wording,
    build_grammar,
    build_prompt,
    count_head_tokens,
    parse_answer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LlavaGuard:
    """The family of LlavaGuard; its releases differ in their chat layout and in the wording of one step."""

    layout: Layout
    wording: Wording = "describe"

    @property
    def ratings(self) -> tuple[str, str]:
        return "Safe", "Unsafe"

    def adapt_prompt(self, prompt: str) -> str:
        return adapt_wording(self.wording, prompt)

    def build_example(self) -> str:
        return self._question("Is this image safe?")

    async def judge(self, generate: GenerateFn, policy: Policy, detail: Detail, *, answer_tokens: int) -> FamilyScores:
        """The score alone takes one token without a grammar: prefill and no more.

        Otherwise score and answer come of one request. The score is the odds of the two rating tokens at the first
        position. The grammar allows both there, so masking the others changes nothing about it; and greedy decoding
        takes the likelier one. Only weights that would rather spell a rating in pieces can disagree with their own
        score: then the rating is given to them.
        """
        asked = self._question(policy.prompt)
        if detail == "score":
            score = (await generate(asked)).score
            return FamilyScores("Unsafe" if score > 0.5 else "Safe", score)
        categories = (*CATEGORIES, *policy.own_categories)
        # A long name of a category must not be taken out of what the rationale has.
        tokens = answer_tokens + count_head_tokens(categories) - count_head_tokens()
        reply = await generate(asked, tokens=tokens, ebnf=build_grammar(policy.rationale, categories=categories))
        score = reply.score
        scored: Rating = "Unsafe" if score > 0.5 else "Safe"
        if score != 0.5 and not reply.text.startswith(scored):
            logger.debug("asking again with the rating that the score implies")
            reply = await generate(asked, tokens=tokens, ebnf=build_grammar(policy.rationale, scored, categories))
        answer = parse_answer(reply.text, policy.rationale, cut=reply.cut, categories=categories)
        return FamilyScores(answer.rating, score, answer.category, answer.rationale, answer.truncated)

    def _question(self, prompt: str) -> str:
        # A layout that ends with a colon has the answer begin with a space, as in training.
        asked = build_prompt(self.layout, self.adapt_prompt(prompt))
        return f"{asked} {ANSWER_START}" if asked.endswith(":") else asked + ANSWER_START
