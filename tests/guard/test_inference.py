"""Through the real engine, whatever the checkpoint's weights."""

import asyncio
from dataclasses import replace

import pytest

from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.core.values import CATEGORIES, NO_CATEGORY, Assessment, RationaleMode
from services.guard.families.llavaguard_format import ANSWER_START, build_prompt
from services.guard.inference import GuardInference
from tests.support.engine import DEFAULT_PROMPT, SharedGuard, assess, drawn, policy, prepared

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


def check(assessment: Assessment, mode: RationaleMode) -> None:
    assert 0 <= assessment.score <= 1
    assert assessment.score == 0.5 or (assessment.rating == "Unsafe") == (assessment.score > 0.5)
    if assessment.rating == "Unsafe":
        assert assessment.category in CATEGORIES
    else:
        assert assessment.category in {*CATEGORIES, NO_CATEGORY}
    if mode == "always" or (mode == "unsafe" and assessment.rating == "Unsafe"):
        assert assessment.rationale
        assert assessment.rationale.isprintable()
    else:
        assert assessment.rationale is None


@pytest.mark.parametrize("mode", ["unsafe", "always", "never"])
async def test_every_answer_is_readable(engine: SharedGuard, mode: RationaleMode) -> None:
    assessments = await asyncio.gather(*(engine.assess(drawn(seed), policy(mode), "verdict") for seed in range(6)))
    for assessment in assessments:
        check(assessment, mode)
        assert assessment.output_tokens > 1


async def test_score_is_equal_with_and_without_a_verdict(engine: SharedGuard) -> None:
    for seed in range(4):
        verdict = await engine.assess(drawn(seed), policy("never"), "verdict")
        look = await engine.assess(drawn(seed), policy("never"), "score")
        # The grammar's mask leaves the odds of the two ratings as they are: 1e-8 was measured.
        assert look.score == pytest.approx(verdict.score, abs=1e-5)
        assert look.output_tokens == 1


async def test_repeated_call_gives_the_same_assessment(engine: SharedGuard) -> None:
    image = drawn(11)
    await engine.assess(image, policy(), "verdict")  # from here on the prompt is cached alike
    first, second = [await engine.assess(image, policy(), "verdict") for _ in range(2)]
    assert first == second


async def test_second_policy_finds_the_image_in_the_cache(engine: SharedGuard) -> None:
    image = drawn(12)
    other = policy(prompt=DEFAULT_PROMPT.replace("Provide a safety", "Write a safety", 1))
    first, second = await engine.on_loop(engine.guard.assess_each(image, [policy(), other], "score"))
    before, _, after = (build_prompt("chatml-llava", DEFAULT_PROMPT) + ANSWER_START).partition("<image>")
    before_image, after_image = [len(await engine.on_loop(engine.engine.tokenize(text))) for text in (before, after)]
    image_tokens = first.prompt_tokens - before_image - after_image
    assert image_tokens >= 16
    # Up to the first word in which the policies differ: the text before the image, the image, and a line break.
    assert second.cached_tokens == before_image + image_tokens + 1
    assert first.model.prompt != second.model.prompt
    assert first.model.revision == second.model.revision


async def test_each_policy_gets_its_own_assessment(engine: SharedGuard) -> None:
    image = drawn(14)
    modes: tuple[RationaleMode, ...] = ("always", "never", "unsafe")
    each = await engine.on_loop(engine.guard.assess_each(image, [policy(mode) for mode in modes], "verdict"))
    for assessment, mode in zip(each, modes, strict=True):
        check(assessment, mode)
    assert await engine.on_loop(engine.guard.assess_each(image, [], "verdict")) == []
    with pytest.raises(ConfigurationError):
        await engine.on_loop(engine.guard.assess_each(image, [policy(), policy(prompt="<image>")], "score"))


async def test_assessment_names_model_engine_and_prompt(engine: SharedGuard) -> None:
    model = (await engine.assess(drawn(1), policy(), "score")).model
    assert model.name == "tiny"
    assert model.engine.startswith("sglang 0.5")
    assert model.revision.startswith("sha256:")
    assert model.prompt.startswith("sha256:")


async def test_cut_rationale_is_closed_and_marked(engine: SharedGuard) -> None:
    image = drawn(13)
    whole = await engine.assess(image, policy("always"), "verdict")
    assert whole.rationale is not None
    # A few tokens into the rationale, wherever these weights begin it.
    for tokens in range(8, 120):
        brief = GuardInference(engine.engine, deadline_s=120, answer_tokens=tokens)
        try:
            cut = await engine.on_loop(assess(brief, image, policy("always"), "verdict"))
            break
        except UnreadableAnswer:
            continue
    assert cut.rationale_truncated
    assert cut.rationale
    assert whole.rationale.startswith(cut.rationale)
    assert len(cut.rationale) < len(whole.rationale)


async def test_rejected_image_fails_alone(engine: SharedGuard) -> None:
    garbage = prepared(b"\xff\xd8 this is no JPEG")
    half = prepared(drawn(5).data[:400])
    results = await asyncio.gather(
        *(engine.assess(drawn(20 + seed), policy(), "score") for seed in range(3)),
        engine.assess(garbage, policy(), "score"),
        engine.assess(half, policy(), "verdict"),
        *(engine.assess(drawn(30 + seed), policy("never"), "verdict") for seed in range(3)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [*[Assessment] * 3, GuardFailed, GuardFailed, *[Assessment] * 3]


async def test_path_or_url_as_image_bytes_is_rejected(engine: SharedGuard) -> None:
    for place in (b"/etc/hostname", b"http://127.0.0.1/x.png", b"file:///etc/hostname"):
        with pytest.raises(GuardFailed):
            await engine.assess(prepared(place), policy(), "score")


async def test_policy_with_a_chat_marker_is_rejected(engine: SharedGuard) -> None:
    with pytest.raises(ConfigurationError):
        await engine.assess(drawn(1), policy(prompt=f"{DEFAULT_PROMPT}<|im_end|>"), "score")


async def test_call_after_the_deadline_is_unavailable(engine: SharedGuard) -> None:
    hasty = GuardInference(engine.engine, deadline_s=0.01)
    with pytest.raises(GuardUnavailable, match="within"):
        await engine.on_loop(assess(hasty, drawn(99), policy("always"), "verdict"))


async def test_more_callers_than_slots_all_get_an_answer(engine: SharedGuard) -> None:
    narrow = GuardInference(engine.engine, in_flight=2, deadline_s=300)
    work = [assess(narrow, drawn(seed), replace(policy("never")), "verdict") for seed in range(8)]

    async def together() -> list[Assessment]:
        return list(await asyncio.gather(*work))

    assert len(await engine.on_loop(together())) == 8
