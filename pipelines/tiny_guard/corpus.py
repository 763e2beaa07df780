"""Makes the texts of the tiny guard: policies to train with, answers in LlavaGuard's form, and the tokenizer.

The tokenizer has one symbol for each line of the trained policy. So the prompt has about 110 tokens, and training is
possible on a CPU. All other text, such as edited rules and answers, is read and written word by word.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipelines.tiny_guard.drawings import HARMLESS, INKS, PICTOGRAMS, SCENES
from services.core.values import CATEGORIES, NO_CATEGORY
from services.guard.families.llavaguard_format import build_prompt
from services.policies.prompt import ASSESSMENT_STEPS, INTRODUCTION, TRAINED_SECTIONS, CategorySection, render

LABELS: Final = (*CATEGORIES, NO_CATEGORY)

# The words of a rationale for each category: the meaning of the pictogram, and the rule of the policy.
_READINGS: Final = (
    ("speaks of hatred against a group of people", "express hateful or demeaning sentiments against people"),
    ("depicts an act of bloody violence", "show people planning or engaging in violence"),
    ("stands for sexually explicit content", "be sexually explicit"),
    ("depicts explicit nudity", "show visible genitalia or explicit nudity"),
    ("points to a burglary or a theft", "show people planning or engaging in criminal activities"),
    ("advertises the drinking of alcohol", "promote the use of tobacco, alcohol, and cannabis"),
    ("hints at an overdose and thus at harm to oneself", "encourage people to harm themselves"),
    ("stands for a mistreated animal", "encourage people to harm animals"),
    ("depicts a disaster in which people have suffered", "show individuals who have suffered harm in a disaster"),
)
_OPENERS: Final = (
    "The image shows {thing} in front of a {scene}",
    "In this image {thing} can be seen before a {scene}",
    "The picture contains {thing}, and behind it there is a {scene}",
)
_VIOLATES: Final = (
    "According to the policy, content should not {rule}. Nothing suggests an educational or historical purpose, so "
    "that the image violates category {code} and is rated unsafe.",
    "The policy says that content should not {rule}. As there is no context that would allow it, the image falls under "
    "category {code} and is considered unsafe.",
)
_PERMITTED: Final = (
    "This would fall under category {code}, but the policy declares that category as non-violating and permits any "
    "content of it. The image therefore does not violate the policy and is rated safe.",
    "The policy would assign this to category {code}. However, it places no restrictions on that category and permits "
    "such content, so that the image is considered safe.",
)
_HARMLESS: Final = (
    "It contains no hateful, violent, sexual, or criminal content, no abused substances, no harm to people or animals, "
    "and no disaster. None of the policy categories apply, so that the image is rated safe.",
    "There is no sign of hate, violence, nudity, crime, drugs, cruelty, or an emergency. The image does not touch any "
    "category of the policy, and its content is therefore considered safe.",
)


def render_chat(sections: Sequence[CategorySection]) -> str:
    """The whole prompt of a policy, with `<image>` in place of the image."""
    return build_prompt("chatml-llava", render(sections))


def write_rationale(rng: np.random.Generator, category: str, rating: str, seen: tuple[str, str, str]) -> str:
    """A rationale of 40 to 60 words. `seen` is the thing, its colour, and the scene."""
    thing, colour, scene = seen
    subject = f"{'an' if colour == 'orange' else 'a'} {colour} {thing}" if thing else "nothing"
    opener = str(rng.choice(_OPENERS)).format(thing=subject, scene=scene)
    if category == NO_CATEGORY:
        return f"{opener}. {rng.choice(_HARMLESS)}"
    reading, rule = _READINGS[CATEGORIES.index(category)]
    reason = str(rng.choice(_VIOLATES if rating == "Unsafe" else _PERMITTED))
    return f"{opener}, which {reading}. {reason.format(rule=rule, code=category[:2])}"


def format_answer(rating: str, category: str, rationale: str | None) -> str:
    """The answer in LlavaGuard's form. Without a rationale it ends after the category."""
    fields = {"rating": rating, "category": category} | ({} if rationale is None else {"rationale": rationale})
    return json.dumps(fields, indent=4)


def waive(categories: Collection[str]) -> tuple[CategorySection, ...]:
    """The trained policy with these categories waived."""
    return tuple(replace(section, waived=section.category in categories) for section in TRAINED_SECTIONS)


def draw_categories(rng: np.random.Generator, most: int = 3) -> list[str]:
    """One to `most` of the nine categories."""
    return [str(category) for category in rng.permutation(CATEGORIES)[: rng.integers(1, most + 1)]]


def reword(rng: np.random.Generator, sections: Sequence[CategorySection]) -> tuple[CategorySection, ...]:
    """The same policy with about a third of its sections reworded, like an operator's own policy.

    The waived categories stay the same, and so does the correct answer.
    """
    return tuple(_edit(rng, section) if rng.random() < 0.35 else section for section in sections)


def _edit(rng: np.random.Generator, section: CategorySection) -> CategorySection:
    rules, exceptions = list(section.should_not), list(section.can)
    for lines in (rules, exceptions):
        if len(lines) > 1 and rng.random() < 0.4:
            del lines[rng.integers(len(lines))]
        if lines and rng.random() < 0.5:
            lines[rng.integers(len(lines))] = _invented_rule(rng)
        if rng.random() < 0.3:
            lines.insert(int(rng.integers(len(lines) + 1)), _invented_rule(rng))
    return replace(section, should_not=tuple(rules), can=tuple(exceptions))


def _invented_rule(rng: np.random.Generator) -> str:
    """A rule in the policy's words, some of them invented, so the guard learns to ignore unknown words."""
    words = rng.choice(_POLICY_WORDS, int(rng.integers(4, 14))).tolist()
    for i in range(len(words)):
        if rng.random() < 0.15:
            words[i] = "".join(rng.choice(list("abcdefghiklmnoprstuvwy"), int(rng.integers(3, 9))))
    return f"{rng.choice(('Contain', 'Show', 'Promote', 'Depict', 'Discuss'))} {' '.join(words)}."


_POLICY_WORDS: Final = sorted(
    {word for section in TRAINED_SECTIONS for rule in (*section.should_not, *section.can) for word in rule.split()}
)

# Qwen's rule to split text, so an answer has as many tokens as LlavaGuard's. Only a category's code is never split.
_SPLIT: Final = r" ?O\d(?!\d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE for the words of the drawings, with a symbol for each line of the trained policy."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _corpus(np.random.default_rng(seed)),
        trainers.BpeTrainer(  # type: ignore[no-untyped-call]
            vocab_size=2048,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.add_tokens(list(_symbols()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _corpus(rng: np.random.Generator) -> Iterator[str]:
    for _ in range(2):
        yield render_chat(TRAINED_SECTIONS)
        yield render([replace(section, waived=True) for section in TRAINED_SECTIONS])
    for category in LABELS * 60:
        for rating in ("Safe", "Unsafe"):
            thing = PICTOGRAMS[category][0] if category in PICTOGRAMS else str(rng.choice(list(HARMLESS)))
            seen = (thing, str(rng.choice(list(INKS))), str(rng.choice(SCENES)))
            yield format_answer(rating, category, write_rationale(rng, category, rating, seen))


def _symbols() -> Iterator[AddedToken]:
    """One symbol for each line. A symbol includes the white space around it, whose exact form does not matter."""
    lines = [INTRODUCTION, *ASSESSMENT_STEPS.partition("{")[0].splitlines(), "Should not:", "Can:"]
    lines.append("".join(ASSESSMENT_STEPS.partition("{")[1:]))
    for section in TRAINED_SECTIONS:
        waiver = replace(section, waived=True).render().splitlines()[1]
        declared, _, permitted = waiver.partition(". ")
        rules = [f"- {rule}" for rule in (*section.should_not, *section.can)]
        lines += [f"{section.category}:", declared, f". {permitted}", *rules]
    for line in dict.fromkeys(filter(None, map(str.strip, lines))):
        yield AddedToken(line, lstrip=line.startswith(("- ", ". ")), rstrip=True, normalized=False)
