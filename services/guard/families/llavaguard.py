"""LlavaGuard and QwenGuard: one question, one JSON answer with rating, category and rationale."""

import logging
from dataclasses import dataclass

from services.core.values import CATEGORIES, Detail, Policy, Rating
from services.guard.families.base import FamilyAnswer, GenerateFn
from services.guard.families.llavaguard_format import (
    ANSWER_START,
    ChatTemplate,
    ImageOrder,
    Wording,
    adapt_wording,
    bound_tokens_before_rationale,
    build_grammar,
    build_prompt,
    parse_answer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LlavaGuard:
    """The family of LlavaGuard. Its releases differ in the chat template and in the wording of one step."""

    chat_template: ChatTemplate
    wording: Wording = "describe"
    order: ImageOrder = "image_first"

    @property
    def ratings(self) -> tuple[str, str]:
        return "Safe", "Unsafe"

    def adapt_prompt(self, prompt: str) -> str:
        adapted = adapt_wording(self.wording, prompt)
        return f"{adapted}\n<image>" if self.order == "text_first" else adapted

    @property
    def image_token(self) -> tuple[str, str]:
        if self.chat_template == "qwen2-vl":
            return "<|image_pad|>", "image_token_id"
        return "<image>", "image_token_index"

    def build_example(self) -> str:
        return self._build_question("Is this image safe?")

    def build_example_grammar(self) -> str:
        return build_grammar("always")

    async def assess(self, generate: GenerateFn, policy: Policy, detail: Detail, *, answer_tokens: int) -> FamilyAnswer:
        """Score only: one token without a grammar, so the engine does little more than the prefill.

        Otherwise one request gives score and answer. The score is P(Unsafe), from the log probabilities of the two
        rating tokens at the first position. The grammar allows both tokens there, so its mask does not change their
        odds, and greedy decoding takes the more likely one. A model that writes a rating in other tokens can contradict
        its own score. Then a second request fixes the rating.
        """
        prompt = self._build_question(policy.prompt)
        if detail == "score":
            score = (await generate(prompt)).score
            return FamilyAnswer("Unsafe" if score > 0.5 else "Safe", score)
        categories = (*CATEGORIES, *policy.own_categories)
        # A long name of a category must not shorten the rationale.
        tokens = answer_tokens + bound_tokens_before_rationale(categories) - bound_tokens_before_rationale()
        reply = await generate(prompt, tokens=tokens, ebnf=build_grammar(policy.rationale, categories=categories))
        score = reply.score
        scored: Rating = "Unsafe" if score > 0.5 else "Safe"
        if score != 0.5 and not reply.text.startswith(scored):
            logger.debug("repeating the request with the rating of the score")
            reply = await generate(prompt, tokens=tokens, ebnf=build_grammar(policy.rationale, scored, categories))
        answer = parse_answer(reply.text, policy.rationale, cut=reply.cut, categories=categories)
        return FamilyAnswer(answer.rating, score, answer.category, answer.rationale, answer.truncated)

    def _build_question(self, prompt: str) -> str:
        # After a chat template that ends with a colon the answer begins with a space, as in training.
        question = build_prompt(self.chat_template, adapt_wording(self.wording, prompt), self.order)
        return f"{question} {ANSWER_START}" if question.endswith(":") else question + ANSWER_START
