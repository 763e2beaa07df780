"""The figures of a backtest, compared with hand counts and published intervals; the page and hostile text."""

import base64
import hashlib
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.policy_testing.backtest_html import PICTURES_LIMIT, render_page
from pipelines.policy_testing.backtest_report import (
    UNREADABLE,
    BacktestLimits,
    BacktestReport,
    Side,
    VerdictPair,
    build_report,
)
from pipelines.reporting.statistics import Share, ShareDifference, compute_paired_difference, compute_share
from services.core.messages import Timings, Verdict
from services.core.values import CATEGORIES, NO_CATEGORY, Action, Rating

NOW = datetime(2026, 1, 2, tzinfo=UTC)
VIOLENCE, NUDITY = CATEGORIES[1], CATEGORIES[3]
SCORES: dict[Action, float] = {"allow": 0.1, "review": 0.6, "block": 0.9}
ACTIONS = get_args(Action)
JPEG = b"\xff\xd8\xff\xe0 not really"


def judged(
    action: Action = "allow",
    *,
    score: float | None = None,
    rating: Rating | None = None,
    category: str | None = None,
    rationale: str | None = None,
    submission_id: str = "a",
) -> Side:
    """A side with a verdict. Fields that are not given fit the action."""
    verdict = Verdict(
        verdict_id="v",
        submission_id=submission_id,
        uri="s3://uploads/a.jpg",
        version_id=None,
        etag=None,
        sha256=None,
        tenant="default",
        outcome="verdict",
        rating=rating or ("Safe" if action == "allow" else "Unsafe"),
        category=category or (NO_CATEGORY if action == "allow" else VIOLENCE),
        rationale=rationale,
        score=SCORES[action] if score is None else score,
        action=action,
        policy=None,
        model=None,
        effort="full",
        image=None,
        timings_ms=Timings(),
        metadata={},
        submitted_at=NOW,
        judged_at=NOW,
    )
    return Side(verdict, None)


def unreadable() -> Side:
    verdict = judged().verdict
    assert verdict
    nothing = {"rating": None, "category": None, "score": None, "action": "review"}
    return Side(
        verdict.model_copy(update={"outcome": "needs_review", "reason": "unreadable_answer"} | nothing),
        None,
    )


def superseded() -> Side:
    verdict = judged().verdict
    assert verdict
    return Side(verdict.model_copy(update={"outcome": "superseded", "action": None}), None)


def failed(error: str = "not_found: There is no such key.") -> Side:
    return Side(None, error)


def pair(before: Side, after: Side, *, name: str = "a", picture: bytes | None = None) -> VerdictPair:
    return VerdictPair(name, f"s3://uploads/{name}.jpg", before, after, picture)


def report_on(*pairs: VerdictPair, per_day: float | None = None) -> BacktestReport:
    return build_report(pairs, before="shop@3", after="shop@4", per_day=per_day)


def sample(counts: dict[tuple[Action, Action], int]) -> list[VerdictPair]:
    """Pairs of actions, as many as given."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return [pair(judged(before), judged(after), name=f"{index:04}") for index, (before, after) in enumerate(kinds)]


class TestSide:
    def test_side_needs_exactly_one_of_verdict_and_error(self) -> None:
        with pytest.raises(ValueError, match="either"):
            Side(None, None)
        with pytest.raises(ValueError, match="either"):
            Side(judged().verdict, "expired: It is late.")


class TestIntervals:
    def test_wilson_interval_matches_hand_count(self) -> None:
        # The closed form with z = 1.96 for 3 of 10.
        z, p, n = 1.959963984540054, 0.3, 10
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        found = compute_share(3, 10)
        assert found.share == 0.3
        assert found.interval
        assert (found.interval.low, found.interval.high) == pytest.approx((middle - reach, middle + reach))

    @pytest.mark.parametrize(
        ("table", "low", "high"),
        [
            # Bentur et al. 2009 and Cavo et al. 2012, as M. W. Fagerland, S. Lydersen and P. Laake work them out in
            # Statistical Analysis of Contingency Tables (2017), chapter 8: "Newcombe square-and-add".
            ((1, 1, 7, 12), 0.0256, 0.5069),
            ((59, 6, 16, 80), 0.0046, 0.1186),
        ],
    )
    def test_paired_difference_matches_published_intervals(
        self, table: tuple[int, int, int, int], low: float, high: float
    ) -> None:
        both, before_only, after_only, neither = table
        found = compute_paired_difference(both=both, before_only=before_only, after_only=after_only, neither=neither)
        assert found.difference == (after_only - before_only) / sum(table)
        assert found.interval
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=5e-5)

    def test_paired_difference_matches_a_bootstrap(self) -> None:
        table = (60, 12, 45, 883)
        found = compute_paired_difference(both=60, before_only=12, after_only=45, neither=883)
        drawn = np.random.default_rng(1).multinomial(1000, np.array(table) / 1000, size=20_000)
        low, high = np.quantile((drawn[:, 2] - drawn[:, 1]) / 1000, [0.025, 0.975])
        assert found.interval
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.003)

    @given(st.tuples(*[st.integers(0, 2000)] * 4))
    def test_paired_difference_is_within_bounds_for_every_table(self, table: tuple[int, int, int, int]) -> None:
        both, before_only, after_only, neither = table
        found = compute_paired_difference(both=both, before_only=before_only, after_only=after_only, neither=neither)
        if not sum(table):
            assert found.difference is None
            assert found.interval is None
            return
        assert found.difference is not None
        assert found.interval
        assert -1 <= found.interval.low <= found.difference <= found.interval.high <= 1
        assert found.interval.low < found.interval.high
        swapped = compute_paired_difference(both=both, before_only=after_only, after_only=before_only, neither=neither)
        assert swapped.interval
        assert swapped.interval.low == pytest.approx(-found.interval.high)
        assert swapped.interval.high == pytest.approx(-found.interval.low)

    def test_share_text_has_value_and_interval(self) -> None:
        assert str(compute_share(3, 10)) == "30.0% (10.8% to 60.3%)"
        assert str(compute_share(0, 0)) == "unknown"
        found = compute_paired_difference(both=59, before_only=6, after_only=16, neither=80)
        assert str(found) == "+6.2 points (+0.5 to +11.9)"
        assert str(ShareDifference(before_only=0, after_only=0, of=0, difference=None, interval=None)) == "unknown"


class TestBuildReport:
    def test_rates_are_over_submissions_judged_under_both(self) -> None:
        report = report_on(
            *sample({("allow", "allow"): 5, ("allow", "block"): 2, ("review", "block"): 1, ("block", "review"): 1}),
            pair(judged("block"), failed("guard_failed: The engine refuses the image.")),
            pair(failed(), judged("block")),
            pair(failed(), failed("expired: It is late.")),
            pair(judged(), unreadable()),
        )
        assert report.pairs == 13
        assert (report.judged_both, report.judged_before_only, report.judged_after_only) == (10, 1, 1)
        assert report.judged_neither == 1
        assert report.failures_before.by_reason == {"not_found": 2}
        assert report.failures_after.by_reason == {"guard_failed": 1, "expired": 1}
        assert report.failures_after.all == compute_share(2, 13)
        assert (report.before.allow, report.before.review, report.before.block) == (
            compute_share(8, 10),
            compute_share(1, 10),
            compute_share(1, 10),
        )
        assert (report.after.allow, report.after.review, report.after.block) == (
            compute_share(5, 10),
            compute_share(2, 10),
            compute_share(3, 10),
        )
        assert (report.before.unreadable, report.after.unreadable) == (compute_share(0, 10), compute_share(1, 10))
        assert report.block_difference == compute_paired_difference(both=0, before_only=1, after_only=3, neither=6)
        assert report.review_difference == compute_paired_difference(both=0, before_only=1, after_only=2, neither=7)
        assert report.action_flips == compute_share(5, 10)

    def test_needs_review_counts_as_review(self) -> None:
        verdict = judged("block").verdict
        assert verdict
        side = Side(verdict.model_copy(update={"outcome": "needs_review", "reason": "quota"}), None)
        report = report_on(pair(side, side))
        assert report.before.review.count == 1
        assert report.before.block.count == 0
        assert report.before.unreadable.count == 0

    def test_superseded_counts_as_not_judged(self) -> None:
        report = report_on(pair(judged(), superseded()))
        assert report.judged_before_only == 1
        assert report.failures_after.by_reason == {"superseded": 1}

    @pytest.mark.parametrize(
        ("error", "reason"),
        [("expired", "expired"), ("too_large: 9 MB", "too_large"), ("Boom: s3://x", "other"), ("", "other")],
    )
    def test_failures_are_counted_by_reason_without_sentence(self, error: str, reason: str) -> None:
        assert report_on(pair(judged(), failed(error))).failures_after.by_reason == {reason: 1}

    def test_flips_are_grouped_by_direction_and_more_severe_category(self) -> None:
        report = report_on(
            pair(judged("allow"), judged("block", category=NUDITY), name="up"),
            pair(judged("block", category=NUDITY), judged("allow"), name="down"),
            pair(judged("review"), judged("block", category=NUDITY), name="step"),
            pair(judged("allow"), unreadable(), name="unread"),
            pair(judged("block", score=0.9), judged("block", score=0.95, category=NUDITY), name="category"),
            pair(judged("allow"), judged("allow", rating="Unsafe"), name="rating"),
            pair(judged("allow", score=0.1), judged("allow", score=0.2), name="score only"),
        )
        found = {(g.direction, g.category): [f.submission_id for f in g.flips] for g in report.flip_groups}
        assert found == {
            ("allow → block", NUDITY): ["up"],
            ("block → allow", NUDITY): ["down"],
            ("review → block", NUDITY): ["step"],
            ("allow → review", UNREADABLE): ["unread"],
            ("block → block", NUDITY): ["category"],
            ("allow → allow", NO_CATEGORY): ["rating"],
        }
        assert report.flips == 6
        assert report.action_flips.count == 4
        assert [group.before != group.after for group in report.flip_groups] == [True] * 4 + [False] * 2
        assert {group.direction for group in report.flip_groups[:2]} == {"allow → block", "block → allow"}

    def test_flip_has_both_verdicts(self) -> None:
        before = judged("review", score=0.55, rationale="A fist.")
        after = judged("block", score=0.85, category=NUDITY, rationale="Skin.")
        (flip,) = report_on(pair(before, after, name="x")).flip_groups[0].flips
        assert (flip.submission_id, flip.uri) == ("x", "s3://uploads/x.jpg")
        assert (flip.before.score, flip.before.category, flip.before.rationale) == (0.55, VIOLENCE, "A fist.")
        assert (flip.after.score, flip.after.category, flip.after.rationale) == (0.85, NUDITY, "Skin.")
        assert (flip.before.rating, flip.after.action) == ("Unsafe", "block")

    def test_flips_of_a_group_are_sorted_by_change_of_score(self) -> None:
        report = report_on(
            pair(judged("allow", score=0.4), judged("review", score=0.5), name="small"),
            pair(judged("allow", score=0.1), judged("review", score=0.7), name="large"),
        )
        assert [flip.submission_id for flip in report.flip_groups[0].flips] == ["large", "small"]

    def test_review_load_scales_with_submissions(self) -> None:
        report = report_on(
            *sample({("allow", "allow"): 80, ("review", "review"): 4, ("allow", "review"): 16}), per_day=50_000
        )
        thousand, day = report.reviews_per_thousand, report.reviews_per_day
        assert thousand
        assert day
        assert (thousand.before.value, thousand.after.value, thousand.change.value) == pytest.approx((40, 200, 160))
        assert (day.before.value, day.after.value, day.change.value) == pytest.approx((2000, 10_000, 8000))
        wilson = compute_share(20, 100).interval
        assert wilson
        assert (day.after.interval.low, day.after.interval.high) == pytest.approx(
            (wilson.low * 50_000, wilson.high * 50_000)
        )
        assert report_on(*sample({("allow", "review"): 1})).reviews_per_day is None

    @pytest.mark.parametrize("per_day", [-1.0, math.nan, math.inf])
    def test_review_load_invalid_number_per_day_is_rejected(self, per_day: float) -> None:
        with pytest.raises(ValueError, match="per_day"):
            report_on(per_day=per_day)

    @pytest.mark.parametrize("pairs", [[], [pair(failed(), judged())]])
    def test_report_without_common_verdicts_has_unknown_figures(self, pairs: list[VerdictPair]) -> None:
        report = report_on(*pairs, per_day=100)
        assert report.judged_both == 0
        assert report.after.block == Share(count=0, of=0, share=None, interval=None)
        assert report.reviews_per_thousand is None
        assert report.reviews_per_day is None
        assert any("the difference between them is unknown" in line for line in report.lines())
        assert "the difference between them is unknown" in render_page(report, pairs)
        assert report.exceeded(BacktestLimits()) == []
        (sentence,) = report.exceeded(BacktestLimits(max_block_rate=1))
        assert sentence == (
            "The block rate under shop@4 is unknown, because no submission was judged; the limit is 100%."
        )


SIDES = st.one_of(
    st.builds(judged, st.sampled_from(ACTIONS), category=st.sampled_from([VIOLENCE, NUDITY])),
    st.builds(unreadable),
    st.builds(superseded),
    st.builds(failed),
)
PAIRS = st.lists(st.builds(pair, SIDES, SIDES, name=st.text(max_size=5), picture=st.none() | st.just(JPEG)))


class TestEverySample:
    @given(PAIRS)
    def test_report_of_any_sample_has_counts_that_add_up(self, pairs: list[VerdictPair]) -> None:
        report = report_on(*pairs)
        assert report.pairs == len(pairs)
        assert report.pairs == (
            report.judged_both + report.judged_before_only + report.judged_after_only + report.judged_neither
        )
        for rates, failures, lost in (
            (report.before, report.failures_before, report.judged_after_only),
            (report.after, report.failures_after, report.judged_before_only),
        ):
            assert rates.allow.count + rates.review.count + rates.block.count == report.judged_both
            assert rates.unreadable.count <= rates.review.count
            assert sum(failures.by_reason.values()) == failures.all.count == lost + report.judged_neither
        moved = sum(len(group.flips) for group in report.flip_groups if group.before != group.after)
        assert moved == report.action_flips.count
        for difference, name in ((report.block_difference, "block"), (report.review_difference, "review")):
            change = getattr(report.after, name).count - getattr(report.before, name).count
            assert difference.after_only - difference.before_only == change

    @given(PAIRS)
    def test_report_of_any_sample_survives_json(self, pairs: list[VerdictPair]) -> None:
        report = report_on(*pairs, per_day=12.5)
        assert BacktestReport.model_validate_json(report.model_dump_json()) == report

    @given(PAIRS)
    def test_report_does_not_exceed_its_own_figures(self, pairs: list[VerdictPair]) -> None:
        report = report_on(*pairs)
        if not report.judged_both:
            return
        figures = {
            "max_block_rate": report.after.block.share,
            "max_review_rate": report.after.review.share,
            "max_block_increase": report.block_difference.difference,
            "max_review_increase": report.review_difference.difference,
            "max_flips": report.action_flips.share,
            "max_errors": report.failures_after.all.share,
        }
        assert report.exceeded(BacktestLimits.model_validate({k: max(v or 0.0, 0.0) for k, v in figures.items()})) == []
        below = {k: v - 1e-6 for k, v in figures.items() if v}
        below = {k: v for k, v in below.items() if v >= 0}
        assert len(report.exceeded(BacktestLimits.model_validate(below))) == len(below)


class TestLimits:
    REPORT = report_on(
        *sample({("allow", "allow"): 90, ("allow", "block"): 6, ("allow", "review"): 3, ("review", "review"): 1}),
        *[pair(judged(), failed())] * 25,
    )

    def test_exceeded_limit_gives_one_sentence(self) -> None:
        limits = BacktestLimits(
            max_block_rate=0.05,
            max_review_rate=0.03,
            max_block_increase=0.055,
            max_review_increase=0.02,
            max_flips=0.05,
            max_errors=0.1,
        )
        assert self.REPORT.exceeded(limits) == [
            "The block rate under shop@4 is 6% (6 of 100 submissions); the limit is 5%.",
            "The review rate under shop@4 is 4% (4 of 100 submissions); the limit is 3%.",
            "The increase of the block rate is 6 percentage points (6 of 100 submissions); "
            "the limit is 5.5 percentage points.",
            "The increase of the review rate is 3 percentage points (3 of 100 submissions); "
            "the limit is 2 percentage points.",
            "The share of submissions whose action flips is 9% (9 of 100 submissions); the limit is 5%.",
            "The share not judged under shop@4 is 20% (25 of 125 submissions); the limit is 10%.",
        ]

    def test_decrease_does_not_exceed_a_limit(self) -> None:
        report = report_on(*sample({("block", "allow"): 5}))
        assert report.exceeded(BacktestLimits(max_block_increase=0, max_review_increase=0)) == []

    @pytest.mark.parametrize("limit", [-0.1, 1.1, math.nan, "much"])
    def test_limit_outside_of_zero_to_one_is_rejected(self, limit: object) -> None:
        with pytest.raises(ValidationError):
            BacktestLimits.model_validate({"max_flips": limit})

    def test_limit_of_an_unknown_figure_is_rejected(self) -> None:
        with pytest.raises(ValidationError):
            BacktestLimits.model_validate({"max_flip": 0.1})


class TestLines:
    def test_summary_has_the_figures(self) -> None:
        report = report_on(
            *sample({("allow", "allow"): 80, ("allow", "block"): 15, ("review", "review"): 5}),
            pair(judged(), failed()),
            per_day=10_000,
        )
        text = "\n".join(report.lines())
        assert "shop@3 → shop@4: 101 submissions, 100 judged under both" in text
        assert "not judged under shop@4: 1 (not_found 1)" in text
        assert "15.0% (9.3% to 23.3%)" in text
        assert "+15.0 points" in text
        assert "reviews per 1,000 submissions: 50.0 (" in text
        assert "reviews per day: 500 (" in text
        assert "flips: 15 of the action, 0 of only the rating or the category" in text
        assert f"15  allow → block     {VIOLENCE}" in text

    def test_summary_with_control_characters_escapes_them(self) -> None:
        report = report_on(pair(judged(), judged("block", category="O10: \x1b[2Jgone\nnew")))
        assert all(line.isprintable() for line in report.lines())


class Page(HTMLParser):
    """What a browser would make of the page, as far as safety goes."""

    VOID = frozenset({"meta", "img", "br", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in {"td", "th", "p"}:
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for found, attributes in self.tags if found == tag)


TAGS = (
    "html head meta title style body header main section h1 h2 h3 p ul li table caption thead tbody tr th td a strong "
    "bdi br figure img svg rect"
)
ATTRIBUTES = (
    "lang charset http-equiv content name class scope href id tabindex src alt viewbox preserveaspectratio aria-hidden "
    "x y width height"
)


def assert_safe(page: Page) -> None:
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    assert {name for _, attributes in page.tags for name in attributes} <= set(ATTRIBUTES.split())
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in page.style
    assert "@import" not in page.style


class TestPage:
    HOSTILE = "\"'><script>alert(1)</script><img src=//x onerror=y>"

    def test_page_with_hostile_text_escapes_it(self) -> None:
        before = judged("allow", rationale=self.HOSTILE)
        after = judged("block", category=self.HOSTILE, rationale=self.HOSTILE + " after")
        pairs = [
            VerdictPair(self.HOSTILE, f"s3://b/{self.HOSTILE}", before, after, JPEG),
            pair(judged(), failed(f"other: {self.HOSTILE}")),
        ]
        report = build_report(pairs, before=self.HOSTILE, after=self.HOSTILE, per_day=7)
        text = render_page(report, pairs, exceeded=[self.HOSTILE])
        assert "<script" not in text
        page = Page(text)
        assert_safe(page)
        assert f"s3://b/{self.HOSTILE}" in page.text
        assert f"{self.HOSTILE} after" in page.text
        (image,) = page.all("img")
        assert self.HOSTILE in (image["alt"] or "")

    @settings(max_examples=50)
    @given(PAIRS, st.text(), st.text())
    def test_page_of_any_sample_is_safe(self, pairs: list[VerdictPair], policy: str, rationale: str) -> None:
        pairs = [*pairs, pair(judged(), judged("block", rationale=rationale, category=rationale), name=policy)]
        assert_safe(Page(render_page(build_report(pairs, before=policy, after="p@1", per_day=None), pairs)))

    def test_page_loads_and_runs_nothing(self) -> None:
        pairs = [pair(judged(), judged("block"), picture=JPEG)]
        text = render_page(report_on(*pairs), pairs)
        assert text.startswith("<!doctype html>")
        page = Page(text)
        (rules,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
        assert rules == (
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
        before_rules = text[: text.index("Content-Security-Policy")]
        assert "<style" not in before_rules  # a policy binds only what follows it
        assert_safe(page)

    def test_page_has_figures_and_pictures(self) -> None:
        pairs = [
            *sample({("allow", "allow"): 80, ("review", "review"): 5}),
            *[pair(judged(), judged("block", rationale="Blood."), name=f"p{i}", picture=JPEG) for i in range(15)],
            pair(failed(), judged()),
        ]
        report = report_on(*pairs, per_day=10_000)
        page = Page(render_page(report, pairs, exceeded=report.exceeded(BacktestLimits(max_flips=0.1))))
        words = " ".join(page.text.split())
        assert "101 submissions: 100 judged under both versions, 0 only under shop@3, 1 only under shop@4" in words
        assert "Not judged under shop@3: 1," in words
        assert "15.0% (9.3% to 23.3%)" in words
        assert str(report.block_difference) in words
        assert "per day 500 (" in words
        assert "the limit is 10%" in words
        assert words.count("Blood.") == 15
        images, figures = list(page.all("img")), list(page.all("figure"))
        assert len(images) == len(figures) == 15
        assert base64.b64decode((images[0]["src"] or "").removeprefix("data:image/jpeg;base64,")) == JPEG
        assert images[0]["alt"] == f"Submission p0, allow → block, {VIOLENCE}"
        assert all(figure["tabindex"] == "0" for figure in figures)
        assert "blur(" in page.style
        assert ":focus img" in page.style
        assert "prefers-color-scheme: dark" in page.style
        anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        assert {(link["href"] or "")[1:] for link in page.all("a")} == anchors

    def test_page_with_flips_beyond_the_limit_lists_them_without_pictures(self) -> None:
        over = PICTURES_LIMIT + 7
        pairs = [pair(judged(), judged("block"), name=f"{index:04}", picture=JPEG) for index in range(over)]
        pairs.append(pair(judged(), judged("block"), name="9999"))  # has no picture anyway
        text = render_page(report_on(*pairs), pairs)
        page = Page(text)
        assert len(list(page.all("img"))) == PICTURES_LIMIT
        assert sum(attributes.get("class") == "flip" for attributes in page.all("li")) == over + 1
        words = " ".join(page.text.split())
        assert "There are pictures of the first 200 flips only; 7 more are listed without." in words
        assert "listed without" not in render_page(report_on(*pairs[:PICTURES_LIMIT]), pairs)

    def test_page_of_a_report_without_flips_says_so(self) -> None:
        pairs = sample({("allow", "allow"): 3})
        assert "No submission's action, rating or category differs." in Page(render_page(report_on(*pairs), pairs)).text
