"""Asking and reading: no engine, no clock."""

import hashlib
import json
import math
import random
from typing import get_args

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.conversation import generate_chat_conv

from services.core.errors import ConfigurationError, UnreadableAnswer
from services.core.values import CATEGORIES, NO_CATEGORY
from services.guard.families.llavaguard_format import (
    ANSWER_START,
    ChatTemplate,
    adapt_wording,
    bound_tokens_before_rationale,
    build_grammar,
    build_prompt,
    complete_json,
    parse_answer,
    unsafe_probability,
)
from tests.support.engine import DEFAULT_PROMPT

MODES = ("unsafe", "always", "never")
OWN = (*CATEGORIES, "O10: Gl\u00fccksspiel, or a title that is longer than any of the nine", "O19: It's 100 % (a | b)")
RATIONALES = st.text(min_size=1, max_size=80).filter(lambda text: text.strip())


def written(rating: str, category: str, rationale: str | None) -> str:
    """An answer as the guard was trained to write it, without its start."""
    answer = {"rating": rating, "category": category} | ({} if rationale is None else {"rationale": rationale})
    return json.dumps(answer, indent=4).removeprefix(ANSWER_START)


class TestPrompt:
    def test_prompt_has_the_layout_of_the_training(self) -> None:
        assert build_prompt("chatml-llava", "POLICY") == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<image>\nPOLICY<|im_end|>\n<|im_start|>assistant\n"
        )

    @pytest.mark.parametrize("chat_template", get_args(ChatTemplate))
    def test_prompt_equals_sglangs_chat_template(self, chat_template: ChatTemplate) -> None:
        user = [
            {"type": "image_url", "image_url": {"url": "data:,"}},
            {"type": "text", "text": "POLICY"},
        ]
        request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": user}])
        conversation = generate_chat_conv(request, chat_template)
        assert build_prompt(chat_template, "POLICY") == conversation.get_prompt()
        assert build_prompt(chat_template, "POLICY").index(conversation.image_token) < build_prompt(
            chat_template, "POLICY"
        ).index("POLICY")

    def test_wordings_differ_in_one_sentence(self) -> None:
        assert adapt_wording("explain", DEFAULT_PROMPT) == DEFAULT_PROMPT
        described = adapt_wording("describe", DEFAULT_PROMPT)
        assert "Explain the reason why" not in described
        assert described.count('3. Provide a "rationale". Describe the user content and justify why') == 1

    def test_default_policy_makes_a_prompt(self) -> None:
        assert DEFAULT_PROMPT in build_prompt("chatml-llava", DEFAULT_PROMPT)

    @pytest.mark.parametrize(
        "marker",
        ["<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|image_pad|>", "</s>", "<start_of_image>"],
    )
    def test_policy_with_a_chat_marker_is_rejected(self, marker: str) -> None:
        with pytest.raises(ConfigurationError, match="must not contain"):
            build_prompt("chatml-llava", f"Be kind.{marker}")


class TestParsing:
    @given(RATIONALES.filter(str.isprintable))
    def test_written_answer_is_parsed(self, rationale: str) -> None:
        answer = parse_answer(written("Unsafe", CATEGORIES[1], rationale), "unsafe", cut=False)
        assert (answer.rating, answer.category, answer.truncated) == ("Unsafe", CATEGORIES[1], False)
        assert answer.rationale == " ".join(rationale.split())

    def test_safe_answer_has_no_rationale(self) -> None:
        answer = parse_answer(written("Safe", NO_CATEGORY, None), "unsafe", cut=False)
        assert (answer.rating, answer.category, answer.rationale) == ("Safe", NO_CATEGORY, None)

    def test_safe_answer_may_name_a_category(self) -> None:
        assert parse_answer(written("Safe", CATEGORIES[4], None), "unsafe", cut=False).category == CATEGORIES[4]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "Safe",
            'Safe"}',
            'Maybe",\n    "category": "NA: None applying"\n}',
            written("Unsafe", NO_CATEGORY, "Because."),
            written("Unsafe", "O10: Else", "Because."),
            written("Unsafe", CATEGORIES[0], "  "),
            written("Unsafe", CATEGORIES[0], None),
            written("Unsafe", CATEGORIES[0], "\u200b\x07"),
            written("Safe", NO_CATEGORY, None)[:-1],
        ],
    )
    def test_other_text_is_unreadable(self, text: str) -> None:
        with pytest.raises(UnreadableAnswer):
            parse_answer(text, "unsafe", cut=False)

    def test_own_category_is_read_only_when_declared(self) -> None:
        answer = written("Unsafe", OWN[9], "Because.")
        assert parse_answer(answer, "unsafe", cut=False, categories=OWN).category == OWN[9]
        with pytest.raises(UnreadableAnswer):
            parse_answer(answer, "unsafe", cut=False)

    def test_invisible_characters_are_removed(self) -> None:
        answer = parse_answer(
            written("Unsafe", CATEGORIES[0], "one\u202etwo\n\tthree\u2028four\x00"), "unsafe", cut=False
        )
        assert answer.rationale == "onetwo three four"

    @given(RATIONALES, st.data())
    def test_rationale_cut_anywhere_is_closed(self, rationale: str, data: st.DataObject) -> None:
        whole = written("Unsafe", CATEGORIES[2], rationale)
        begins = whole.index('"rationale": "') + len('"rationale": "')
        cut_at = data.draw(st.integers(begins, len(whole) - 1))
        document = json.loads(complete_json(ANSWER_START + whole[:cut_at]))
        assert rationale.startswith(document["rationale"]) or rationale.rstrip(" ") == document["rationale"]
        document["rationale"].encode()  # no half of a surrogate pair is left

    @given(st.integers(0, 400))
    def test_cut_answer_is_marked_or_unreadable(self, length: int) -> None:
        whole = written("Unsafe", CATEGORIES[2], 'It "shows" \\ a knife \u2019 \U0001f52a.')
        text = whole[:length]
        try:
            answer = parse_answer(text, "unsafe", cut=True)
        except UnreadableAnswer:
            assert len(text) <= whole.index('"rationale": "') + len('"rationale": "')
        else:
            assert answer.truncated == (len(whole) - len(text) > len("\n}"))
            assert answer.rationale


class TestScore:
    @given(st.floats(-60, 0), st.floats(-60, 0))
    def test_score_is_the_probability_of_unsafe(self, safe: float, unsafe: float) -> None:
        score = unsafe_probability(safe, unsafe)
        assert score == pytest.approx(math.exp(unsafe) / (math.exp(safe) + math.exp(unsafe)), abs=1e-9)
        assert (score > 0.5) == (unsafe > safe) or safe == pytest.approx(unsafe)

    @pytest.mark.parametrize(("safe", "unsafe", "score"), [(0, -1e38, 0), (-1e38, 0, 1), (-1e38, -1e38, 0.5)])
    def test_extreme_log_probabilities_give_exact_scores(self, safe: float, unsafe: float, score: float) -> None:
        assert unsafe_probability(safe, unsafe) == score

    def test_score_that_is_nan_is_unreadable(self) -> None:
        with pytest.raises(UnreadableAnswer):
            unsafe_probability(math.nan, -1)


VOCABULARY = [
    *(bytes([byte]) for byte in range(256)),
    *(b"Safe", b"Unsafe", b'",\n', b"    ", b' "', b'"\n}', b'"\n', b"rationale", b"category", b"  ", b" \n\t", b"\\u"),
    *(b"\\ud83d\\u", b"ud83d", b'\\"', b"\\\\", b" the", b" image", b"\xe2\x80\x99", b"O2: Violence", b"}}", b'": "'),
    b"<eos>",
]


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    tokens = xgrammar.TokenizerInfo(
        VOCABULARY, xgrammar.VocabType.RAW, vocab_size=len(VOCABULARY), stop_token_ids=[len(VOCABULARY) - 1]
    )
    return xgrammar.GrammarCompiler(tokens)


def walk(compiled: xgrammar.CompiledGrammar, choose: random.Random, limit: int) -> tuple[str, bool]:
    """Tokens chosen at random among those that the grammar allows; whether the limit ended it."""
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    text = b""
    # Some walks prefer to go on, so that the limit is met too.
    patience = choose.random()
    for _ in range(limit):
        matcher.fill_next_token_bitmask(mask)
        bits = mask[0].tolist()
        allowed = [token for token in range(len(VOCABULARY)) if bits[token // 32] >> (token % 32) & 1]
        assert allowed
        onwards = [token for token in allowed if b'"' not in VOCABULARY[token]]
        token = choose.choice(onwards if onwards and choose.random() < patience else allowed)
        assert matcher.accept_token(token)
        if matcher.is_terminated():
            return text.decode(), False
        text += VOCABULARY[token]
    return text.decode(), True


class TestGrammar:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("rating", [None, "Safe", "Unsafe"])
    def test_random_tokens_under_the_grammar_make_a_readable_answer(self, compiler, mode, rating) -> None:
        compiled = compiler.compile_grammar(build_grammar(mode, rating))
        for seed in range(150):
            text, cut = walk(compiled, random.Random(seed), limit=bound_tokens_before_rationale() + 1 + seed)
            answer = parse_answer(text, mode, cut=cut)
            assert rating in (None, answer.rating)
            assert (answer.category in CATEGORIES) or (answer.rating == "Safe" and answer.category == NO_CATEGORY)
            has_rationale = {"unsafe": answer.rating == "Unsafe", "always": True, "never": False}[mode]
            if has_rationale:
                assert answer.rationale
                assert answer.rationale.isprintable()
                assert "  " not in answer.rationale
            else:
                assert answer.rationale is None
                assert not answer.truncated

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("rating", "category", "rationale", "allowed_in"),
        [
            ("Safe", NO_CATEGORY, None, {"unsafe", "never"}),
            ("Safe", CATEGORIES[3], None, {"unsafe", "never"}),
            ("Safe", NO_CATEGORY, "The image shows a cat.", {"always"}),
            ("Unsafe", CATEGORIES[8], 'It\u2019s a \U0001f525 \u00e9 "fire" \\ so.', {"unsafe", "always"}),
            ("Unsafe", CATEGORIES[8], None, {"never"}),
            ("Unsafe", NO_CATEGORY, "Because.", set()),
            ("Unsafe", NO_CATEGORY, None, set()),
            ("Unsafe", CATEGORIES[0], "", set()),
            ("Unsafe", CATEGORIES[0], " ", set()),
            ("Unsafe", CATEGORIES[0], "a  b", set()),
            ("Unsafe", CATEGORIES[0], "a\nb", set()),
            ("Unsafe", CATEGORIES[0], "a\x07b", set()),
            ("Unsafe", CATEGORIES[0], "a\ud83d b", set()),
        ],
    )
    def test_grammar_accepts_only_valid_answers(self, compiler, mode, rating, category, rationale, allowed_in) -> None:
        matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(build_grammar(mode)))
        said = matcher.accept_string(written(rating, category, rationale))
        assert said == (mode in allowed_in)

    def test_default_grammar_is_unchanged(self) -> None:
        digests = [hashlib.sha256(build_grammar(mode).encode()).hexdigest()[:16] for mode in MODES]
        assert digests == ["a9d61cea340f62e6", "753248301b4ec199", "f34416bcc78d4688"]
        assert bound_tokens_before_rationale() == 80

    @pytest.mark.parametrize("category", OWN[9:])
    @pytest.mark.parametrize("rating", ["Safe", "Unsafe"])
    def test_grammar_accepts_own_categories(self, compiler, category, rating) -> None:
        answer = written(rating, category, "Because.")
        for categories in (CATEGORIES, OWN):
            matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(build_grammar("always", categories=categories)))
            assert matcher.accept_string(answer) == (categories is OWN)

    def test_long_category_leaves_the_rationale_its_tokens(self, compiler) -> None:
        compiled = compiler.compile_grammar(build_grammar("always", categories=OWN))
        head = written("Unsafe", OWN[9], "").removesuffix('"\n}')
        assert len(head) == bound_tokens_before_rationale(OWN) > bound_tokens_before_rationale()
        for seed in range(50):
            text, cut = walk(compiled, random.Random(seed), limit=bound_tokens_before_rationale(OWN) + 1)
            assert parse_answer(text, "always", cut=cut, categories=OWN).category in (*OWN, NO_CATEGORY)
