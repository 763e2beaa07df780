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
    """The family of LlavaGuard. Its releases differ in the chat layout and in the wording of one step."""

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
        """Score only: one token without a grammar, so the engine does little more than the prefill.

        Otherwise one request gives score and answer. The score is P(Unsafe), from the log probabilities of the two
        rating tokens at the first position. The grammar allows both tokens there, so its mask does not change their
        odds, and greedy decoding takes the more likely one. A model that writes a rating in other tokens can contradict
        its own score. Then a second request fixes the rating.
        """
        asked = self._question(policy.prompt)
        if detail == "score":
            score = (await generate(asked)).score
            return FamilyScores("Unsafe" if score > 0.5 else "Safe", score)
        categories = (*CATEGORIES, *policy.own_categories)
        # A long name of a category must not shorten the rationale.
        tokens = answer_tokens + count_head_tokens(categories) - count_head_tokens()
        reply = await generate(asked, tokens=tokens, ebnf=build_grammar(policy.rationale, categories=categories))
        score = reply.score
        scored: Rating = "Unsafe" if score > 0.5 else "Safe"
        if score != 0.5 and not reply.text.startswith(scored):
            logger.debug("repeating the request with the rating of the score")
            reply = await generate(asked, tokens=tokens, ebnf=build_grammar(policy.rationale, scored, categories))
        answer = parse_answer(reply.text, policy.rationale, cut=reply.cut, categories=categories)
        return FamilyScores(answer.rating, score, answer.category, answer.rationale, answer.truncated)

    def _question(self, prompt: str) -> str:
        # After a layout that ends with a colon the answer begins with a space, as in training.
        asked = build_prompt(self.layout, self.adapt_prompt(prompt))
        return f"{asked} {ANSWER_START}" if asked.endswith(":") else asked + ANSWER_START
