"""What differs between families of guards, behind one interface.

Another family is a row of `services.guard.checkpoints.CHECKPOINTS` and one module with a `ModelFamily` in it.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

from services.core.errors import ConfigurationError
from services.core.values import NO_CATEGORY, Detail, Policy, Rating

_MARKER: Final = re.compile(r"<image>|<\|[a-z_]+\|>|</?s>|</?(?:start|end)_of_[a-z]+>|</?[A-Z]+_SAFETY_POLICY>")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the engine says to one question."""

    score: float
    """P(the second word of `ModelFamily.ratings`) in [0, 1], at the first position, among the two words."""
    text: str
    """What was written from there on."""
    cut: bool
    """The token limit ended it."""


@dataclass(frozen=True, slots=True)
class FamilyScores:
    """What a family makes of the replies."""

    rating: Rating
    score: float
    """P(Unsafe) in [0, 1]."""
    category: str = NO_CATEGORY
    rationale: str | None = None
    truncated: bool = False
    """The rationale was cut by the token limit."""


class GenerateFn(Protocol):
    """Asks the engine about the image at hand: greedy decoding, one request."""

    async def __call__(self, text: str, *, tokens: int = 1, ebnf: str | None = None) -> Reply:
        """`text` is the whole prompt, up to where the rating begins. `ebnf` binds what is written from there on.

        Raises:
            GuardFailed, GuardUnavailable, UnreadableAnswer: as `GuardInference.assess_each`.
        """
        ...


class ModelFamily(Protocol):
    """How one family of guards is asked, and how its answers become a judgement."""

    @property
    def ratings(self) -> tuple[str, str]:
        """The words for Safe and for Unsafe, as they are written where a question ends."""
        ...

    def adapt_prompt(self, prompt: str) -> str:
        """A policy's text in the words of this family, as a verdict's `model.prompt` stands for it."""
        ...

    def build_example(self) -> str:
        """A whole question with little in it, to try an engine and its tokenizer with."""
        ...

    async def judge(self, generate: GenerateFn, policy: Policy, detail: Detail, *, answer_tokens: int) -> FamilyScores:
        """Judge the image at hand under a policy.

        An answer may have `answer_tokens` tokens, and as many more as longer names of the policy's own categories take.

        Raises:
            ConfigurationError: the policy cannot be put to this family.
            UnreadableAnswer: a reply is not an answer.
        """
        ...


def reject_chat_markers(prompt: str) -> str:
    """The policy's text as it is.

    Raises:
        ConfigurationError: it contains a marker of a chat layout, which could end the user's turn early.
    """
    if marker := _MARKER.search(prompt):
        raise ConfigurationError(f"The policy's text must not contain {marker[0]}: it means something to the model.")
    return prompt
