"""The interface of a family of guard models: its prompts and its answers.

A new family needs a module with a `ModelFamily`, and a row in `services.guard.checkpoints.CHECKPOINTS`.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

from services.core.errors import ConfigurationError
from services.core.values import NO_CATEGORY, Detail, Policy, Rating

_MARKER: Final = re.compile(r"<image>|<\|[a-z_]+\|>|</?s>|</?(?:start|end)_of_[a-z]+>|</?[A-Z]+_SAFETY_POLICY>")


@dataclass(frozen=True, slots=True)
class Reply:
    """The engine's answer to one prompt."""

    score: float
    """P(the second word of `ModelFamily.ratings`) in [0, 1], at the first position, among the two words."""
    text: str
    """The generated text, from the rating on."""
    cut: bool
    """The token limit ended the text."""


@dataclass(frozen=True, slots=True)
class FamilyAnswer:
    """The answer that a family derives from the engine's replies."""

    rating: Rating
    score: float
    """P(Unsafe) in [0, 1]."""
    category: str = NO_CATEGORY
    rationale: str | None = None
    truncated: bool = False
    """The rationale was cut by the token limit."""


class GenerateFn(Protocol):
    """Sends one prompt about the image to the engine, with greedy decoding."""

    async def __call__(self, text: str, *, tokens: int = 1, ebnf: str | None = None) -> Reply:
        """`text` is the whole prompt, up to the rating. `ebnf` is a grammar for the generated text.

        Raises:
            GuardFailed, GuardUnavailable, UnreadableAnswer: as `GuardInference.assess_each`.
        """
        ...


class ModelFamily(Protocol):
    """Builds the prompts of one family of guards, and reads its answers."""

    @property
    def ratings(self) -> tuple[str, str]:
        """The words for Safe and for Unsafe that follow the prompt."""
        ...

    def adapt_prompt(self, prompt: str) -> str:
        """A policy's text in the words of this family. A verdict's `model.prompt` is its digest."""
        ...

    @property
    def image_token(self) -> tuple[str, str]:
        """The token that stands for the image in a prompt, and the key of its id in the checkpoint's config.json."""
        ...

    def build_example(self) -> str:
        """A short complete prompt about one image, to test an engine and its tokenizer."""
        ...

    def build_example_grammar(self) -> str | None:
        """The EBNF of an answer to the example; None if this family needs no grammar."""
        ...

    async def assess(self, generate: GenerateFn, policy: Policy, detail: Detail, *, answer_tokens: int) -> FamilyAnswer:
        """Assess the image under a policy.

        An answer may have `answer_tokens` tokens, and more if the names of the policy's own categories are longer.

        Raises:
            ConfigurationError: this family cannot judge by the policy.
            UnreadableAnswer: a reply cannot be read.
        """
        ...


def reject_chat_markers(prompt: str) -> str:
    """Return the policy's text unchanged.

    Raises:
        ConfigurationError: it contains a marker of a chat layout, which could end the user's turn early.
    """
    if marker := _MARKER.search(prompt):
        raise ConfigurationError(
            f"The policy's text must not contain {marker[0]}: the model reads it as a marker of the chat layout."
        )
    return prompt
