"""Families of guards: how they are asked and read, and once each through the real engine with random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.core.errors import ConfigurationError
from services.core.values import CATEGORIES, NO_CATEGORY
from services.guard.checkpoints import CHECKPOINTS, Checkpoint, resolve_checkpoint
from services.guard.engine import Engine
from services.guard.families.base import Reply
from services.guard.families.llavaguard import LlavaGuard
from services.guard.families.shieldgemma import ShieldGemma, parse_enforced_rules
from services.guard.inference import GuardInference
from tests.support import fake_checkpoints
from tests.support.engine import DEFAULT_PROMPT, assess, drawn, policy

WAIVER = "Category O3 is declared as non-violating. Therefore, we do not provide any restrictions for this category"


class FakeEngine:
    """Gives the answers of a test, and records the prompts."""

    def __init__(self, answer: Callable[[str], float], text: str = "") -> None:
        self._answer = answer
        self._text = text
        self.asked: list[str] = []

    async def __call__(self, text: str, *, tokens: int = 1, ebnf: str | None = None) -> Reply:
        self.asked.append(text)
        return Reply(score=self._answer(text), text=self._text, cut=False)


class TestShieldGemma:
    def test_each_enforced_category_gets_a_question(self) -> None:
        assert list(parse_enforced_rules(DEFAULT_PROMPT)) == list(CATEGORIES)
        rules = parse_enforced_rules(DEFAULT_PROMPT)[CATEGORIES[1]]
        assert rules.startswith("No Violence, Harm, or Cruelty: The image follows these rules.\nShould not:\n- ")
        assert "O3" not in rules
        assert "Assessment Steps" not in parse_enforced_rules(DEFAULT_PROMPT)[CATEGORIES[-1]]

    def test_waived_category_gets_no_question(self) -> None:
        waived = DEFAULT_PROMPT.replace("O3: Sexual Content: \n", f"O3: Sexual Content: \n{WAIVER}\n")
        assert list(parse_enforced_rules(waived)) == [
            category for category in CATEGORIES if not category.startswith("O3")
        ]

    def test_own_category_gets_a_question(self) -> None:
        own = "O10: Gambling (money)"
        block = f"{own}: \nShould not:\n- Say that a stake is declared as non-violating.\n"
        prompt = DEFAULT_PROMPT.replace("\nAssessment Steps:", f"\n{block}\nAssessment Steps:")
        rules = parse_enforced_rules(prompt, (*CATEGORIES, own))[own]
        assert rules.startswith("No Gambling (money): The image follows these rules.\nShould not:\n- Say that")
        assert "Assessment Steps" not in rules
        assert "O10" not in parse_enforced_rules(prompt, (*CATEGORIES, own))[CATEGORIES[8]]

    async def test_category_with_the_highest_score_decides(self) -> None:
        ask = FakeEngine(lambda text: 0.9 if "No Animal Cruelty" in text else 0.6 if "Nudity" in text else 0.1)
        judged = await ShieldGemma().assess(ask, policy(), "verdict", answer_tokens=9)
        assert (judged.rating, judged.category, judged.score) == ("Unsafe", CATEGORIES[7], 0.9)
        assert judged.rationale is not None
        assert CATEGORIES[7] in judged.rationale
        assert len(ask.asked) == len(CATEGORIES)
        assert all(text.startswith("<start_of_turn>user\n<start_of_image>") for text in ask.asked)
        assert (await ShieldGemma().assess(ask, policy("never"), "verdict", answer_tokens=9)).rationale is None
        assert (await ShieldGemma().assess(ask, policy(), "score", answer_tokens=9)).category == NO_CATEGORY

    async def test_image_with_low_scores_is_rated_safe(self) -> None:
        judged = await ShieldGemma().assess(FakeEngine(lambda _: 0.2), policy(), "verdict", answer_tokens=9)
        assert (judged.rating, judged.category, judged.rationale, judged.score) == ("Safe", NO_CATEGORY, None, 0.2)
        always = await ShieldGemma().assess(FakeEngine(lambda _: 0.2), policy("always"), "verdict", answer_tokens=9)
        assert always.rationale

    async def test_policy_that_waives_every_category_rates_safe(self) -> None:
        everything = "\n".join(f"{category}: \n{WAIVER}\n" for category in CATEGORIES)
        ask = FakeEngine(lambda _: 1.0)
        judged = await ShieldGemma().assess(ask, policy(prompt=everything), "verdict", answer_tokens=9)
        assert (judged.rating, judged.score, ask.asked) == ("Safe", 0.0, [])

    @pytest.mark.parametrize("prompt", ["Be kind.", f"{DEFAULT_PROMPT}<end_of_turn>", "</END_SAFETY_POLICY>"])
    async def test_prompt_with_markers_or_without_categories_is_rejected(self, prompt: str) -> None:
        with pytest.raises(ConfigurationError):
            await ShieldGemma().assess(FakeEngine(lambda _: 0), policy(prompt=prompt), "score", answer_tokens=9)


class TestLlavaGuard:
    async def test_rating_that_contradicts_the_score_is_asked_again(self) -> None:
        ask = FakeEngine(lambda _: 0.9, text='Safe",\n    "category": "NA: None applying"\n}')
        await LlavaGuard("chatml-llava").assess(ask, policy("never"), "verdict", answer_tokens=9)
        assert len(ask.asked) == 2

    async def test_own_category_can_be_the_answer(self) -> None:
        own = "O10: A title that is longer than any of LlavaGuard's nine categories"
        asked: list[int] = []

        async def ask(text: str, *, tokens: int = 1, ebnf: str | None = None) -> Reply:
            assert ebnf is not None
            assert own in ebnf
            asked.append(tokens)
            return Reply(0.9, f'Unsafe",\n    "category": "{own}"\n}}', cut=False)

        by = replace(policy("never"), own_categories=(own,))
        judged = await LlavaGuard("chatml-llava").assess(ask, by, "verdict", answer_tokens=9)
        assert (judged.category, asked) == (own, [9 + len(own) - max(map(len, CATEGORIES))])

    async def test_prompt_has_the_wording_of_the_training(self) -> None:
        for wording, sentence in (("explain", "Explain the reason why"), ("describe", "Describe the user content")):
            ask = FakeEngine(lambda _: 0.9)
            await LlavaGuard("chatml-llava", wording).assess(ask, policy(), "score", answer_tokens=9)
            assert ask.asked[0].count(sentence) == 1

    def test_question_ends_with_the_start_of_the_answer(self) -> None:
        assert LlavaGuard("vicuna_v1.1").build_example().endswith('ASSISTANT: {\n    "rating": "')
        assert LlavaGuard("qwen2-vl").build_example().endswith('<|im_start|>assistant\n{\n    "rating": "')


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
def test_every_checkpoint_has_an_example_and_two_ratings(row: Checkpoint) -> None:
    assert row.family.build_example()
    assert len(set(row.family.ratings)) == 2


@pytest.mark.engine
@pytest.mark.timeout(600)
class TestRealEngine:
    async def test_shieldgemma_judges_each_category(self, tmp_path: Path) -> None:
        checkpoint = resolve_checkpoint(str(fake_checkpoints.shieldgemma(tmp_path / "weights")))
        assert checkpoint.name == "ShieldGemma-2-4B"
        async with Engine(checkpoint, state_dir=tmp_path / "state", start_s=500) as engine:
            guard = GuardInference(engine, deadline_s=120)
            await guard.check()
            verdict = await assess(guard, drawn(1), policy(), "verdict")
            assert 0 < verdict.score < 1
            assert (verdict.rating == "Unsafe") == (verdict.score > 0.5) == (verdict.category in CATEGORIES)
            assert (verdict.rationale is not None) == (verdict.rating == "Unsafe")
            assert verdict.output_tokens == len(CATEGORIES)
            # Each question after the first finds the image, and the text before it, in the cache.
            before = await engine.tokenize("<start_of_turn>user\n\n\n<start_of_image>")
            assert verdict.cached_tokens >= (len(CATEGORIES) - 1) * (len(before) + 4)
            look = await assess(guard, drawn(1), policy(), "score")
            assert look.score == pytest.approx(verdict.score, abs=0.01)
            other = await assess(guard, drawn(2), policy(), "score")
            assert other.score != look.score, "the image makes no difference"

    async def test_qwenguard_reuses_the_cached_image(self, tmp_path: Path) -> None:
        # Its hidden size is that of no release, so no row is found for its folder.
        row = replace(resolve_checkpoint("QwenGuard-v1.2-3B"), folder=fake_checkpoints.qwenguard(tmp_path / "weights"))
        async with Engine(row, state_dir=tmp_path / "state", start_s=500) as engine:
            guard = GuardInference(engine, deadline_s=120)
            await guard.check()
            verdict, again = await guard.assess_each(drawn(1), [policy(), policy("never")], "verdict")
            assert verdict.rating == ("Unsafe" if verdict.score > 0.5 else "Safe")
            assert again.score == pytest.approx(verdict.score, abs=0.01)
            assert again.cached_tokens > 0.9 * again.prompt_tokens
            assert (await assess(guard, drawn(2), policy(), "score")).score != verdict.score

    async def test_llavaguard_1_reuses_the_cached_image(self, tmp_path: Path) -> None:
        row = replace(
            resolve_checkpoint("LlavaGuard-v1.1-7B"), folder=fake_checkpoints.llavaguard_1(tmp_path / "weights")
        )
        async with Engine(row, state_dir=tmp_path / "state", start_s=500) as engine:
            guard = GuardInference(engine, deadline_s=120)
            await guard.check()
            verdict, again = await guard.assess_each(drawn(1), [policy(), policy("never")], "verdict")
            assert verdict.rating == ("Unsafe" if verdict.score > 0.5 else "Safe")
            assert again.score == pytest.approx(verdict.score, abs=0.01)
            assert again.cached_tokens > 0.9 * again.prompt_tokens
            assert (await assess(guard, drawn(2), policy(), "score")).score != verdict.score
