"""Assesses images on an engine."""

import asyncio
import base64
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final, Self

from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.core.probe_image import draw_probe_image
from services.core.settings import Settings
from services.core.values import Assessment, Detail, GuardPriority, ModelIdentity, Policy, PreparedImage
from services.guard.engine import Engine
from services.guard.families.base import Reply
from services.guard.families.llavaguard_format import bound_tokens_before_rationale, unsafe_probability
from services.guard.slots import EngineSlots

RATIONALE_TOKENS: Final = 256
"""The limit of a rationale. LlavaGuard's rationales have about 70 tokens."""

_CHECKED_IMAGES: Final = 4

_PRIORITY: Final[Mapping[GuardPriority, int]] = {"interactive": 2, "live": 1, "backfill": 0}


@dataclass(frozen=True, slots=True)
class _RatingTokens:
    safe: int
    unsafe: int


class GuardInference:
    """Assesses images with an engine's checkpoint. It has no credentials, and no network but the engine.

    At most `in_flight` assessments are at the engine at a time; the others wait here.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        in_flight: int | None = None,
        deadline_s: float = 60,
        answer_tokens: int = bound_tokens_before_rationale() + RATIONALE_TOKENS,
    ) -> None:
        """
        Args:
            engine: must have started, unless `in_flight` is given.
            in_flight: by default that of the engine.
            deadline_s: for one assessment, from the moment that it gets its slot.
            answer_tokens: the limit of an answer under LlavaGuard's own categories; a longer rationale is cut and
                marked.
        """
        self.engine = engine
        self._slots = EngineSlots(in_flight or engine.in_flight, engine.health_check)
        self._deadline_s = deadline_s
        self._answer_tokens = answer_tokens
        self._rating_tokens: _RatingTokens | None = None
        self._image_hash_key = secrets.token_bytes(32)

    @classmethod
    def from_settings(cls, engine: Engine, settings: Settings) -> Self:
        return cls(engine, in_flight=settings.guard_in_flight, deadline_s=settings.guard_deadline_s)

    @property
    def max_side_px(self) -> int:
        """The longest side of an image, in pixels, that the checkpoint can use."""
        return self.engine.checkpoint.max_side_px

    def identity(self, policy: Policy) -> ModelIdentity:
        """The model that judges by this policy. `prompt` is the digest of the policy's text in the family's words.

        Raises:
            GuardUnavailable: the engine was never started.
        """
        return ModelIdentity(
            name=self.engine.checkpoint.name,
            revision=self.engine.revision,
            engine=_engine_version(),
            prompt=_prompt_digest(self.engine.checkpoint.family.adapt_prompt(policy.prompt)),
        )

    async def check(self) -> None:
        """Check that tokenizer, config and weights of the checkpoint fit together, so that scores mean something.

        Raises:
            ConfigurationError: the tokenizer begins both ratings with the same token, the prompt has no place for the
                image, the scores are not numbers, or they do not depend on the image.
            GuardUnavailable: the engine is not ready.
        """
        await self._find_rating_tokens()
        await self._check_image_token()
        await self._check_scores()

    async def _check_image_token(self) -> None:
        """SGLang puts the image in the place of the token that the config names, or over the first token."""
        checkpoint = self.engine.checkpoint
        token, key = checkpoint.family.image_token
        config = await asyncio.to_thread(self.engine.read_config)
        if key not in config:
            return  # SGLang takes the token from the tokenizer.
        ids = await self.engine.tokenize(checkpoint.family.build_example())
        if (count := ids.count(config[key])) != 1:
            raise ConfigurationError(
                f"{key} is {config[key]} in the config.json of {checkpoint.name}, and this token stands {count} times "
                f"in a prompt with one {token}, so the model would not see the image in its place. Use the tokenizer "
                "and the config.json with which the checkpoint was trained."
            )

    async def _check_scores(self) -> None:
        family = self.engine.checkpoint.family
        answers = []
        for number in range(_CHECKED_IMAGES):
            image = base64.b64encode(draw_probe_image(number=number)).decode()
            request = {"text": family.build_example(), "image_data": f"data:image/jpeg;base64,{image}"}
            answers.append(await self._generate(request, tokens=1))
        name = self.engine.checkpoint.name
        try:
            for answer in answers:
                await self._read_score(answer)
        except UnreadableAnswer:
            raise ConfigurationError(
                f"{name} gives no score for a test image, as after an overflow in half precision. Check its weights, "
                "or choose another checkpoint (SLUICE_MODEL)."
            ) from None
        if len({str(answer["meta_info"]["output_token_ids_logprobs"][0]) for answer in answers}) == 1:
            raise ConfigurationError(
                f"{name} gives the same score for {_CHECKED_IMAGES} different images, so it does not see them. Check "
                "its vision tower and its config.json, or choose another checkpoint (SLUICE_MODEL)."
            )

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        """Judge an image under each policy, in their order. An image and a policy always get the same assessment.

        The policies are judged one after the other in one slot, so that each after the first finds the image in the
        engine's cache. The deadline is multiplied by the number of policies, and begins with the slot: work that the
        GPU has begun is not thrown away because it waited. An error under one policy ends them all.

        Raises:
            GuardFailed: the engine refuses the image twice, or fails three times because of it.
            GuardUnavailable: the engine is not ready, is full, went away, or took longer than the deadline.
            UnreadableAnswer: the answer cannot be read.
            ConfigurationError: the checkpoint cannot judge by the policy: its text contains a marker of the layout.
        """
        if not policies:
            return []
        async with self._slot(image.sha256, priority, len(policies)):
            data_url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
            request = {
                "image_data": data_url,
                "mm_hashes": [self._hash_image(image.data)],
                "priority": _PRIORITY[priority],
            }
            return [await self._assess(request, policy, detail) for policy in policies]

    @asynccontextmanager
    async def _slot(self, sha256: str, priority: GuardPriority, assessments: int) -> AsyncIterator[None]:
        deadline_s = self._deadline_s * assessments
        try:
            async with self._slots.acquire(sha256, priority), asyncio.timeout(deadline_s):
                yield
        except TimeoutError:
            raise GuardUnavailable(
                f"The engine did not answer within {deadline_s:.0f} s (SLUICE_GUARD_DEADLINE_S)."
            ) from None

    def _hash_image(self, data: bytes) -> str:
        """The name of an image in the engine's cache. Otherwise the engine hashes the pixels between two batches.

        Nobody else can compute it: with two images of the same name, the second would get the verdict of the first.
        """
        return hashlib.blake2b(data, key=self._image_hash_key, digest_size=8).hexdigest()

    async def _assess(self, request: Mapping[str, Any], policy: Policy, detail: Detail) -> Assessment:
        used = Counter[str]()

        async def generate(text: str, *, tokens: int = 1, ebnf: str | None = None) -> Reply:
            answer = await self._generate({**request, "text": text}, tokens=tokens, ebnf=ebnf)
            meta = answer["meta_info"]
            used.update({name: meta[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")})
            cut = meta["finish_reason"]["type"] == "length"
            return Reply(await self._read_score(answer), answer["text"], cut)

        model = self.identity(policy)
        family = self.engine.checkpoint.family
        answer = await family.assess(generate, policy, detail, answer_tokens=self._answer_tokens)
        return Assessment(
            rating=answer.rating,
            category=answer.category,
            rationale=answer.rationale,
            score=answer.score,
            model=model,
            rationale_truncated=answer.truncated,
            prompt_tokens=used["prompt_tokens"],
            cached_tokens=used["cached_tokens"],
            output_tokens=used["completion_tokens"],
        )

    async def _generate(self, request: Mapping[str, Any], *, tokens: int, ebnf: str | None = None) -> dict[str, Any]:
        """One greedy generation with the rating tokens' log probabilities. A rejected request is retried once."""
        rating = await self._find_rating_tokens()
        body = {
            **request,
            "sampling_params": _sampling_params(tokens, ebnf),
            "return_logprob": True,
            "token_ids_logprob": [rating.safe, rating.unsafe],
        }
        try:
            answer = await self.engine.generate(body)
        except GuardFailed:
            answer = await self.engine.generate(body)
        finish = answer.get("meta_info", {}).get("finish_reason") or {}
        if finish.get("type") not in ("stop", "length"):
            raise GuardUnavailable(
                f"The engine ended the request early ({finish.get('type') or 'without a reason'}); send it again."
            )
        return answer

    async def _read_score(self, answer: Mapping[str, Any]) -> float:
        tokens = await self._find_rating_tokens()
        try:
            first = answer["meta_info"]["output_token_ids_logprobs"][0]
            logprobs = {int(token): float(logprob) for logprob, token, *_ in first}
            return unsafe_probability(logprobs[tokens.safe], logprobs[tokens.unsafe])
        except (LookupError, TypeError, ValueError):
            raise UnreadableAnswer("The engine's answer has no score.") from None

    async def _find_rating_tokens(self) -> _RatingTokens:
        """The first token of each rating. If a rating has several tokens, the first stands for it."""
        if self._rating_tokens is None:
            family = self.engine.checkpoint.family
            before = family.build_example()
            ids = await self.engine.tokenize(before)
            safe, unsafe = [await self._token_after(before, ids, word) for word in family.ratings]
            if safe == unsafe:
                raise ConfigurationError(
                    f"The tokenizer of {self.engine.checkpoint.name} begins {' and '.join(family.ratings)} with the "
                    "same token, so there is no score. Choose another checkpoint (SLUICE_MODEL)."
                )
            self._rating_tokens = _RatingTokens(safe, unsafe)
        return self._rating_tokens

    async def _token_after(self, before: str, ids: list[int], word: str) -> int:
        longer = await self.engine.tokenize(before + word)
        if longer[: len(ids)] != ids or len(longer) == len(ids):
            name = self.engine.checkpoint.name
            raise ConfigurationError(f"The tokenizer of {name} joins the rating {word} with the text before it.")
        return longer[len(ids)]


def _sampling_params(tokens: int, ebnf: str | None) -> dict[str, Any]:
    """Every field that affects the answer, so that no default of the engine or the checkpoint does."""
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
