"""LlavaGuard's prompts, the grammar of its answers, and their parser. Pure: text in, values out."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from services.core.errors import UnreadableAnswer
from services.core.values import CATEGORIES, NO_CATEGORY, Rating, RationaleMode
from services.guard.families.base import reject_chat_markers

ChatTemplate = Literal["chatml-llava", "vicuna_v1.1", "qwen2-vl"]
"""The chat template of a checkpoint's training, by SGLang's names."""

Wording = Literal["explain", "describe"]
"""The wording of the rationale step in a checkpoint's training; see `adapt_wording`."""

ImageOrder = Literal["image_first", "text_first"]
"""Whether the image comes before or after the policy in a prompt."""

ANSWER_START: Final = '{\n    "rating": "'
"""The start of every answer. The next token is the rating."""

_CATEGORY_KEY: Final = '",\n    "category": "'
_RATIONALE_KEY: Final = '",\n    "rationale": "'
_END: Final = '"\n}'

_VISIBLE: Final = r"[!#-\[\]-~]"
"""The characters of a rationale that need no escape, without the space."""

_EXPLAIN: Final = (
    "Explain the reason why the content is considered safe or unsafe, referring to the description of the assigned "
    "policy category."
)
_DESCRIBE: Final = (
    "Describe the user content and justify why it is considered safe or unsafe, referring to the specific policy "
    "category and its associated guidelines to illustrate any violations or compliance."
)

_CUT_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-f]{0,3})?$")
_CUT_PAIR: Final = re.compile(r"\\ud[89ab][0-9a-f]{2}$")


def bound_tokens_before_rationale(categories: Sequence[str] = CATEGORIES) -> int:
    """The largest number of tokens of an answer without its rationale, with any of these categories or none.

    A token has at least one character, and the answer is ASCII.
    """
    longest = max(len(_escaped(category)) for category in (*categories, NO_CATEGORY))
    return len("Unsafe" + _CATEGORY_KEY + _RATIONALE_KEY) + longest


def build_prompt(chat_template: ChatTemplate, prompt: str, order: ImageOrder = "image_first") -> str:
    """The prompt in the chat template of the training, up to the start of the answer.

    It has no beginning-of-text token: the tokenizer adds it.

    Raises:
        ConfigurationError: the prompt contains a marker of a chat template, which would end the user's turn early.
    """
    prompt = reject_chat_markers(prompt)
    qwen = chat_template == "qwen2-vl"
    image = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
    image_first = f"{image}{prompt}" if qwen else f"{image}\n{prompt}"
    user = image_first if order == "image_first" else f"{prompt}\n{image}"
    if chat_template == "vicuna_v1.1":
        return (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the user's questions. USER: {user} ASSISTANT:"
        )
    return _chatml(user)


def adapt_wording(wording: Wording, prompt: str) -> str:
    """The prompt with the third assessment step in the words of a checkpoint's training.

    LlavaGuard's repository trains v1.0 with `explain` (its template json-v16), and v1.1 and later with `describe`
    (json-v22, json-v24, which share json_template_v20). Its notebooks use `describe` for v1.2, too.
    """
    return prompt if wording == "explain" else prompt.replace(_EXPLAIN, _DESCRIBE)


def _chatml(user: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def build_grammar(mode: RationaleMode, rating: Rating | None = None, categories: Sequence[str] = CATEGORIES) -> str:
    """The EBNF (xgrammar) of the text after `ANSWER_START`, for both ratings or for one.

    `categories` are the full names of all categories. A Safe answer names any of them or none. An Unsafe answer names
    one and, unless `mode` is `never`, has a rationale. A rationale is ASCII with JSON escapes, as in training. It
    begins with a visible character and has no two spaces in a row, so that no model can fill it with white space.
    """
    ratings: tuple[Rating, ...] = ("Safe", "Unsafe") if rating is None else (rating,)
    root = " | ".join(
        f"{_literal(rating + _CATEGORY_KEY)} {'any' if rating == 'Safe' else 'violated'} "
        f"{'reasoned' if _has_rationale(rating, mode) else 'bare'}"
        for rating in ratings
    )
    violated = " | ".join(_literal(_escaped(category)) for category in categories)
    word, escaped = f"{_VISIBLE} {_VISIBLE}*", f'"\\\\" escape {_VISIBLE}*'
    return "\n".join(
        [
            f"root ::= {root}",
            f"any ::= violated | {_literal(NO_CATEGORY)}",
            f"violated ::= {violated}",
            f"bare ::= {_literal(_END)}",
            # Whole words stay inside one rule. With `+`, `?` or a rule for each character, xgrammar would check every
            # token that leaves the rule at each step: 1000 to 1900 microseconds a token instead of 4, with a
            # vocabulary of 1424.
            f"reasoned ::= {_literal(_RATIONALE_KEY)} {word} rest {_literal(_END)}",
            f'rest ::= "" | " " {word} rest | {escaped} rest | " " {escaped} rest',
            'escape ::= ["\\\\] | "u" code',
            # No control characters, and no lone surrogates, which UTF-8 cannot encode.
            'code ::= "00" [a-f] hex | "0" [1-9a-f] hex hex | [1-9abcef] hex hex hex | "d" [0-7] hex hex'
            ' | "d" [89ab] hex hex "\\\\ud" [c-f] hex hex',
            "hex ::= [0-9a-f]",
        ]
    )


@dataclass(frozen=True, slots=True)
class LlavaGuardAnswer:
    """A parsed answer."""

    rating: Rating
    category: str
    rationale: str | None
    truncated: bool
    """The rationale was cut by the token limit."""


def parse_answer(
    text: str, mode: RationaleMode, *, cut: bool, categories: Sequence[str] = CATEGORIES
) -> LlavaGuardAnswer:
    """Parse the text after `ANSWER_START`. `cut`: the token limit ended the text.

    Raises:
        UnreadableAnswer: the text does not match `build_grammar(mode, categories=categories)`, or it was cut before
            the first word of its rationale.
    """
    whole = ANSWER_START + text
    truncated = False
    try:
        document = json.loads(whole)
    except ValueError:
        if not cut:
            raise UnreadableAnswer("The guard's answer is not JSON.") from None
        truncated = _ends_inside_string(whole)
        try:
            document = json.loads(complete_json(whole))
        except ValueError:
            raise UnreadableAnswer("The guard's answer was cut before its category.") from None
    if not isinstance(document, dict):
        raise UnreadableAnswer("The guard's answer is not a JSON object.")
    rating, category, rationale = (document.get(key) for key in ("rating", "category", "rationale"))
    if rating not in {"Safe", "Unsafe"}:
        raise UnreadableAnswer("The guard's answer has no rating.")
    fits = category in categories or (category == NO_CATEGORY and rating == "Safe")
    if not isinstance(category, str) or not fits:
        raise UnreadableAnswer(f"The guard's answer is {rating} with a category that does not fit this rating.")
    if not _has_rationale(rating, mode):
        return LlavaGuardAnswer(rating, category, None, truncated=False)
    if not isinstance(rationale, str) or not (rationale := _clean(rationale)):
        raise UnreadableAnswer("The guard's answer lacks its rationale.")
    return LlavaGuardAnswer(rating, category, rationale, truncated)


def _has_rationale(rating: Rating, mode: RationaleMode) -> bool:
    return mode == "always" or (mode == "unsafe" and rating == "Unsafe")


def complete_json(text: str) -> str:
    """Complete a JSON object that was cut inside or right after its last string. Half an escape is dropped."""
    if _ends_inside_string(text):
        odd_backslashes = (len(text) - len(text.rstrip("\\"))) % 2
        if odd_backslashes:
            text = text[:-1]
        elif (escape := _CUT_ESCAPE.search(text)) and not _is_escaped(text, escape.start()):
            text = text[: escape.start()]
        # Drop the first half of a surrogate pair.
        if (pair := _CUT_PAIR.search(text)) and not _is_escaped(text, pair.start()):
            text = text[: pair.start()]
        text = text.rstrip(" ") + '"'
    return text.rstrip() + "\n}"


def unsafe_probability(safe: float, unsafe: float) -> float:
    """P(Unsafe) in [0, 1], relative to both rating tokens, from their log probabilities.

    Raises:
        UnreadableAnswer: a log probability is not a number.
    """
    if math.isnan(safe) or math.isnan(unsafe):
        raise UnreadableAnswer("The guard's score is not a number.")
    difference = safe - unsafe
    # Above this exp overflows; the score is 0 in double precision.
    return 0.0 if difference > 700 else 1 / (1 + math.exp(difference))


def _clean(rationale: str) -> str:
    """Remove invisible characters (control, format and unassigned ones) and runs of white space."""
    seen = (c for c in rationale if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(seen).split())


def _ends_inside_string(text: str) -> bool:
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\" and inside:
            escaped = True
        elif character == '"':
            inside = not inside
    return inside


def _is_escaped(text: str, index: int) -> bool:
    """Whether the backslash at `index` is itself the second half of an escaped backslash."""
    before = text[:index]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _escaped(category: str) -> str:
    """A category as it is in an answer: ASCII with JSON escapes, as in training."""
    return json.dumps(category)[1:-1]


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
