"""Judging one image under one policy, on an engine."""

import asyncio
import base64
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final, Self

from services.contracts import (
    NO_CATEGORY,
    Assessment,
    Detail,
    ModelIdentity,
    Policy,
    PreparedImage,
    Priority,
    Rating,
    RationaleMode,
)
from services.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.guard.answer import ANSWER_START, HEAD_TOKENS, grammar, p_unsafe, question, read
from services.guard.engine import Engine
from services.guard.places import Places
from services.settings import Settings

logger = logging.getLogger(__name__)

RATIONALE_TOKENS: Final = 256
"""Bound of a rationale. LlavaGuard's take about 70 tokens."""

_PRIORITY: Final[Mapping[Priority, int]] = {"live": 1, "backfill": 0}


@dataclass(frozen=True, slots=True)
class _RatingTokens:
    safe: int
    unsafe: int


class Guard:
    """Assesses images with an engine's checkpoint: pure inference, no credentials, no network beyond the engine.

    At most `in_flight` assessments are with the engine at a time; the others wait here.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        in_flight: int = 16,
        deadline_s: float = 60,
        answer_tokens: int = HEAD_TOKENS + RATIONALE_TOKENS,
    ) -> None:
        """`deadline_s` holds for one assessment, waiting included. `answer_tokens` bounds an answer; a rationale that
        does not fit is cut and marked."""
        self.engine = engine
        self._places = Places(in_flight)
        self._deadline_s = deadline_s
        self._answer_tokens = answer_tokens
        self._rating_tokens: _RatingTokens | None = None

    @classmethod
    def from_settings(cls, engine: Engine, settings: Settings) -> Self:
        return cls(engine, in_flight=settings.guard_in_flight, deadline_s=settings.guard_deadline_s)

    @property
    def max_side_px(self) -> int:
        """Longest side of an image, in pixels, beyond which the checkpoint sees nothing more."""
        return self.engine.checkpoint.max_side_px

    def identity(self, policy: Policy) -> ModelIdentity:
        """What judges under this policy.

        Raises:
            GuardUnavailable: the engine was never started.
        """
        return ModelIdentity(
            name=self.engine.checkpoint.name,
            revision=self.engine.revision,
            engine=_engine_version(),
            prompt=_prompt_digest(policy.prompt),
        )

    async def check(self) -> None:
        """See that the checkpoint, whose engine is ready, can be asked for a score.

        Raises:
            ConfigurationError: its tokenizer does not write each rating as one token.
            GuardUnavailable: the engine is not ready.
        """
        await self._tokens()

    async def assess(
        self, image: PreparedImage, policy: Policy, detail: Detail, priority: Priority = "live"
    ) -> Assessment:
        """Judge an image. Greedy decoding: the same image and policy get the same assessment.

        Raises:
            GuardFailed: the engine refuses the image twice, or fails three times because of it.
            GuardUnavailable: the engine is not ready, full, gone, or took longer than the deadline.
            UnreadableAnswer: the answer cannot be read.
            ConfigurationError: the policy's prompt contains a marker of the chat layout.
        """
        prompt = question(self.engine.checkpoint.layout, policy.prompt)
        async with self._place(image.sha256, priority):
            request = {
                "text": prompt + ANSWER_START,
                "image_data": f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}",
                "priority": _PRIORITY[priority],
            }
            if detail == "score":
                return await self._score(request, self.identity(policy))
            return await self._verdict(request, self.identity(policy), policy.rationale)

    @asynccontextmanager
    async def _place(self, sha256: str, priority: Priority) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._deadline_s), self._places.take(sha256, priority):
                yield
        except TimeoutError:
            raise GuardUnavailable(
                f"The engine gave no answer within {self._deadline_s:.0f} s (SLUICE_GUARD_DEADLINE_S)."
            ) from None

    async def _score(self, request: Mapping[str, Any], model: ModelIdentity) -> Assessment:
        """One token without a grammar: prefill and no more."""
        answer = await self._generate(request, tokens=1)
        score = await self._read_score(answer)
        meta = answer["meta_info"]
        return Assessment(
            rating="Unsafe" if score > 0.5 else "Safe",
            category=NO_CATEGORY,
            rationale=None,
            score=score,
            model=model,
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            output_tokens=meta["completion_tokens"],
        )

    async def _verdict(self, request: Mapping[str, Any], model: ModelIdentity, mode: RationaleMode) -> Assessment:
        """Score and answer in one request.

        The score is the odds of the two rating tokens at the first position. The grammar allows both there, so
        masking the others changes nothing about it; and greedy decoding takes the likelier one. Only weights that
        would rather spell a rating in pieces can disagree with their own score: then the rating is given to them.
        """
        answer = await self._generate(request, tokens=self._answer_tokens, ebnf=grammar(mode))
        score = await self._read_score(answer)
        scored: Rating = "Unsafe" if score > 0.5 else "Safe"
        text: str = answer["text"]
        meta = answer["meta_info"]
        output_tokens = meta["completion_tokens"]
        if score != 0.5 and not text.startswith(scored):
            logger.debug("asking again with the rating that the score implies")
            answer = await self._generate(request, tokens=self._answer_tokens, ebnf=grammar(mode, scored))
            text = answer["text"]
            output_tokens += answer["meta_info"]["completion_tokens"]
        read_answer = read(text, mode, cut=answer["meta_info"]["finish_reason"]["type"] == "length")
        return Assessment(
            rating=read_answer.rating,
            category=read_answer.category,
            rationale=read_answer.rationale,
            score=score,
            model=model,
            rationale_truncated=read_answer.truncated,
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            output_tokens=output_tokens,
        )

    async def _generate(self, request: Mapping[str, Any], *, tokens: int, ebnf: str | None = None) -> dict[str, Any]:
        """One greedy generation with the rating tokens' log probabilities; a refusal is tried once more."""
        rating = await self._tokens()
        body = {
            **request,
            "sampling_params": _sampling(tokens, ebnf),
            "return_logprob": True,
            "token_ids_logprob": [rating.safe, rating.unsafe],
        }
        try:
            answer = await self.engine.generate(body)
        except GuardFailed:
            answer = await self.engine.generate(body)
        finish = answer.get("meta_info", {}).get("finish_reason") or {}
        if finish.get("type") not in ("stop", "length"):
            raise GuardUnavailable("The engine dropped the request.")
        return answer

    async def _read_score(self, answer: Mapping[str, Any]) -> float:
        tokens = await self._tokens()
        try:
            first = answer["meta_info"]["output_token_ids_logprobs"][0]
            logprobs = {int(token): float(logprob) for logprob, token, *_ in first}
            return p_unsafe(logprobs[tokens.safe], logprobs[tokens.unsafe])
        except (LookupError, TypeError, ValueError):
            raise UnreadableAnswer("The engine's answer has no score.") from None

    async def _tokens(self) -> _RatingTokens:
        if self._rating_tokens is None:
            before = question(self.engine.checkpoint.layout, "") + ANSWER_START
            ids = await self.engine.tokenize(before)
            found = [await self._token_after(before, ids, word) for word in ("Safe", "Unsafe")]
            self._rating_tokens = _RatingTokens(*found)
        return self._rating_tokens

    async def _token_after(self, before: str, ids: list[int], word: str) -> int:
        longer = await self.engine.tokenize(before + word)
        if longer[:-1] != ids:
            name = self.engine.checkpoint.name
            raise ConfigurationError(f"The tokenizer of {name} does not write the rating {word} as one token.")
        return longer[-1]


def _sampling(tokens: int, ebnf: str | None) -> dict[str, Any]:
    """Every field that bears on the outcome, so that no default of the engine or the checkpoint does."""
    sampling: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "max_new_tokens": tokens,
        "n": 1,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": False,
        "no_stop_trim": False,
    }
    return sampling if ebnf is None else sampling | {"ebnf": ebnf}


@lru_cache(maxsize=256)
def _prompt_digest(prompt: str) -> str:
    return f"sha256:{hashlib.sha256(prompt.encode()).hexdigest()}"


@lru_cache(maxsize=1)
def _engine_version() -> str:
    return f"sglang {version('sglang')}"
