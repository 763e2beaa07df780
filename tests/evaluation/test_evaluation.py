"""The figures of an evaluation: computed by hand for small tables, and compared with scikit-learn for large ones."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from pipelines.evaluation import curves
from pipelines.evaluation.bootstrap import Bootstrap, Metric
from pipelines.evaluation.html import render_page
from pipelines.evaluation.labels import LabelledImage
from pipelines.evaluation.metrics import (
    NOTHING_WAIVED,
    OTHERS_WAIVED,
    SAFE,
    UNREADABLE,
    UNSAFE,
    VIOLATION_WAIVED,
    JudgedRows,
    compute_policy_exception_rate,
    compute_rates_by_category,
    compute_rates_by_waiver_kind,
)
from pipelines.evaluation.perturbations import PERTURBATIONS, perturb
from pipelines.evaluation.plots import draw_plots
from pipelines.evaluation.report import EvaluationReport, build_report
from pipelines.evaluation.results import ResultColumns
from pipelines.tiny_guard.drawings import draw as draw_image
from services.core.messages import Timings, Verdict
from services.core.values import CATEGORIES, NO_CATEGORY, Rating
from tests.support.verdicts import verdict_with

Row = tuple[Rating, Rating | None, str | None, str | None, int]
"""Label, answer, category of the label and of the answer, kind."""

O1, O2 = CATEGORIES[:2]
NAMES = [*CATEGORIES, NO_CATEGORY]
RATES = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "answered")


def judged(rows: Sequence[Row], scores: Sequence[float] | None = None) -> JudgedRows:
    answers = {"Safe": SAFE, "Unsafe": UNSAFE, None: UNREADABLE}
    return JudgedRows(
        expected=np.array([label == "Unsafe" for label, *_ in rows], np.bool_),
        predicted=np.array([answers[predicted] for _, predicted, *_ in rows], np.int8),
        score=np.array(scores if scores is not None else [0.5] * len(rows), np.float64),
        category=np.array([NAMES.index(c) if c else -1 for *_, c, _, _ in rows], np.int16),
        predicted_category=np.array([NAMES.index(c) if c else -1 for *_, c, _ in rows], np.int16),
        waiver_kind=np.array([kind for *_, kind in rows], np.int8),
        image=np.arange(len(rows)),
    )


def bootstrap_of(rows: JudgedRows, resamples: int = 200) -> Bootstrap:
    return Bootstrap(rows.image, seed=1, resamples=resamples)


HAND: list[Row] = [
    *[("Unsafe", "Unsafe", O1, O1, NOTHING_WAIVED)] * 5,
    *[("Unsafe", "Unsafe", O1, O2, NOTHING_WAIVED)] * 1,
    *[("Unsafe", "Safe", O2, NO_CATEGORY, NOTHING_WAIVED)] * 2,
    *[("Unsafe", None, O2, None, NOTHING_WAIVED)] * 1,
    *[("Safe", "Safe", NO_CATEGORY, NO_CATEGORY, NOTHING_WAIVED)] * 6,
    *[("Safe", "Unsafe", NO_CATEGORY, O2, NOTHING_WAIVED)] * 3,
    *[("Safe", None, NO_CATEGORY, None, NOTHING_WAIVED)] * 2,
    *[("Safe", "Safe", O1, O1, VIOLATION_WAIVED)] * 3,
    *[("Safe", "Unsafe", O1, O1, VIOLATION_WAIVED)] * 1,
    *[("Safe", None, O1, None, VIOLATION_WAIVED)] * 1,
    *[("Unsafe", "Unsafe", O2, O2, OTHERS_WAIVED)] * 2,
]


class TestHandCounts:
    """tp 8, fn 2, tn 9, fp 4; the answers for one Unsafe and three Safe rows are unreadable."""

    def test_rates_of_all_rows_match_hand_count(self) -> None:
        rates = compute_rates_by_waiver_kind(judged(HAND), bootstrap_of(judged(HAND)))["all"]
        assert rates.rows == 27
        assert rates.confusion.model_dump() == {
            "true_negatives": 9,
            "false_positives": 4,
            "safe_invalid": 3,
            "false_negatives": 2,
            "true_positives": 8,
            "unsafe_invalid": 1,
        }
        expected = {
            "accuracy": 17 / 23,
            "balanced_accuracy": (8 / 10 + 9 / 13) / 2,
            "precision": 8 / 12,
            "recall": 8 / 10,
            "specificity": 9 / 13,
            "f1": 16 / 22,
            "answered": 23 / 27,
        }
        assert {name: getattr(rates, name).value for name in RATES} == pytest.approx(expected)
        assert (rates.accuracy.of, rates.recall.of, rates.answered.of) == (23, 10, 27)

    def test_rates_by_kind_of_waiver_match_hand_count(self) -> None:
        found = compute_rates_by_waiver_kind(judged(HAND), bootstrap_of(judged(HAND)))
        assert {name: rates.rows for name, rates in found.items()} == {
            "all": 27,
            "nothing waived": 20,
            "other categories waived": 2,
            "violated category waived": 5,
        }
        assert found["nothing waived"].accuracy.value == pytest.approx(12 / 17)
        others = found["other categories waived"]
        assert others.specificity.value is None
        assert others.specificity.undefined == "no Safe row has an answer that could be read"

    def test_policy_exception_rate_ignores_unreadable_answers(self) -> None:
        found = compute_policy_exception_rate(judged(HAND), bootstrap_of(judged(HAND)))
        assert (found.value, found.of) == (pytest.approx(3 / 4), 4)

    def test_rates_by_category_match_hand_count(self) -> None:
        found = {
            rates.category: rates
            for rates in compute_rates_by_category(judged(HAND), NAMES, bootstrap_of(judged(HAND)))
        }
        assert list(found) == [O1, O2, NO_CATEGORY]
        first, second = found[O1], found[O2]
        assert (first.unsafe, first.safe, second.unsafe, second.safe) == (6, 5, 5, 0)
        assert (first.recall.value, second.recall.value) == (1.0, pytest.approx(2 / 4))
        assert (first.named.value, second.named.value) == (pytest.approx(5 / 6), 1.0)
        assert first.named_precision.value == pytest.approx(5 / 6), "the sixth is the waived one judged Unsafe"
        assert second.named_precision.value == pytest.approx(2 / 6)
        assert (first.per.value, second.per.value) == (pytest.approx(3 / 4), None)
        assert found[NO_CATEGORY].specificity.value == pytest.approx(6 / 9)

    def test_areas_match_hand_count(self) -> None:
        # Pairs of an Unsafe and a Safe one: 0.9 beats both, 0.4 ties with one and beats none: 2.5 of 4.
        unsafe, score = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.6, 0.4, 0.4])
        roc, precision_recall = curves.compute_roc_and_pr_curves(
            unsafe, score, Bootstrap(np.arange(4), seed=0, resamples=200)
        )
        assert roc.area.value == pytest.approx(2.5 / 4)
        assert precision_recall.area.value == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
        assert (roc.x[0], roc.y[0], roc.x[-1], roc.y[-1]) == (0, 0, 1, 1)

    def test_calibration_error_matches_hand_count(self) -> None:
        unsafe, score = np.array([0.0, 0, 1, 1, 1]), np.array([0.05, 0.15, 0.15, 0.95, 1.0])
        found = curves.measure_calibration(unsafe, score, Bootstrap(np.arange(5), seed=0, resamples=200))
        assert found.ece.value == pytest.approx((0.05 + 2 * abs(0.5 - 0.15) + 2 * (1 - 0.975)) / 5)
        assert found.brier.value == pytest.approx((0.05**2 + 0.15**2 + 0.85**2 + 0.05**2) / 5)
        assert [b.rows for b in found.bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
        assert found.bins[1].unsafe.value == 0.5
        assert (found.bins[5].mean_score, found.bins[5].unsafe.value) == (None, None)
        assert curves.expected_calibration_error(unsafe, score) == pytest.approx(found.ece.value)

    @pytest.mark.parametrize(("prevalence", "load"), [(None, 3 / 5), (0.1, 0.1 * 2 / 3 + 0.9 * 1 / 2)])
    def test_threshold_costs_match_hand_count(self, prevalence: float | None, load: float) -> None:
        unsafe, score = np.array([1.0, 1, 1, 0, 0]), np.array([0.9, 0.5, 0.1, 0.5, 0.2])
        draw = Bootstrap(np.arange(5), seed=0, resamples=200)
        lower, upper = curves.compute_threshold_costs(unsafe, score, draw, [0.95, 0.5], prevalence)
        assert (lower.threshold, upper.threshold) == (0.5, 0.95)
        assert lower.load.value == pytest.approx(load), "a score that is the threshold reaches it"
        assert (lower.misses.value, lower.false_alarms.value) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
        assert (upper.load.value, upper.misses.value, upper.false_alarms.value) == (0, 1, 0)


labelled = st.lists(
    st.tuples(
        st.sampled_from(["Safe", "Unsafe"]),
        st.sampled_from(["Safe", "Unsafe"]),
        st.floats(0, 1).map(lambda s: round(s, 2)),
    ),
    min_size=2,
    max_size=60,
).filter(lambda rows: len({label for label, *_ in rows}) == 2)


class TestAgainstScikitLearn:
    @given(labelled)
    @settings(max_examples=60)
    def test_rates_match_scikit_learn(self, found: list[tuple[Rating, Rating, float]]) -> None:
        rows = judged([(label, predicted, None, None, NOTHING_WAIVED) for label, predicted, _ in found])
        rates = compute_rates_by_waiver_kind(rows, bootstrap_of(rows, resamples=1))["all"]
        truth, answer = rows.expected, rows.predicted == UNSAFE
        assert rates.accuracy.value == pytest.approx(sk.accuracy_score(truth, answer))
        assert rates.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(truth, answer))
        assert rates.recall.value == pytest.approx(sk.recall_score(truth, answer))
        assert rates.specificity.value == pytest.approx(sk.recall_score(truth, answer, pos_label=False))
        assert rates.f1.value == pytest.approx(sk.f1_score(truth, answer))
        precision = rates.precision.value
        assert precision == (pytest.approx(sk.precision_score(truth, answer)) if answer.any() else None)

    @given(labelled, st.integers(0, 2**32 - 1))
    @settings(max_examples=60)
    def test_areas_of_weighted_rows_match_scikit_learn(
        self, found: list[tuple[Rating, Rating, float]], seed: int
    ) -> None:
        unsafe = np.array([label == "Unsafe" for label, *_ in found], np.float64)
        score = np.array([s for *_, s in found])
        weights = np.random.default_rng(seed).integers(0, 4, len(found)).astype(np.float64)
        areas = curves.Ranking(unsafe, score).areas(weights)
        if not weights[unsafe == 1].any() or not weights[unsafe == 0].any():
            assert np.isnan(areas).all()
            return
        assert areas[0] == pytest.approx(sk.roc_auc_score(unsafe, score, sample_weight=weights))
        assert areas[1] == pytest.approx(sk.average_precision_score(unsafe, score, sample_weight=weights))

    def test_brier_score_and_bins_match_scikit_learn(self) -> None:
        rng = np.random.default_rng(5)
        score = rng.random(400)
        unsafe = (rng.random(400) < score**2).astype(np.float64)
        found = curves.measure_calibration(unsafe, score, Bootstrap(np.arange(400), seed=0, resamples=200))
        assert found.brier.value == pytest.approx(sk.brier_score_loss(unsafe, score))
        shares, means = calibration_curve(unsafe, score, n_bins=10)
        assert [b.unsafe.value for b in found.bins] == pytest.approx(shares.tolist())
        assert [b.mean_score for b in found.bins] == pytest.approx(means.tolist())


class TestIntervals:
    def test_same_seed_gives_same_intervals(self) -> None:
        rows = judged(HAND)
        first, again = (
            compute_rates_by_waiver_kind(rows, Bootstrap(rows.image, seed=3, resamples=200)) for _ in range(2)
        )
        other = compute_rates_by_waiver_kind(rows, Bootstrap(rows.image, seed=4, resamples=200))
        assert first == again != other

    def test_interval_of_a_share_has_the_expected_width(self) -> None:
        # Of a share p over n images the standard error is sqrt(p (1 - p) / n), and 1.96 of it are an interval's half.
        rows = judged([("Unsafe", "Unsafe" if n % 5 else "Safe", None, None, NOTHING_WAIVED) for n in range(500)])
        recall = compute_rates_by_waiver_kind(rows, bootstrap_of(rows, resamples=1000))["all"].recall
        assert recall.value == 0.8
        assert recall.low is not None
        assert recall.high is not None
        half = 1.96 * math.sqrt(0.8 * 0.2 / 500)
        assert recall.high - recall.low == pytest.approx(2 * half, rel=0.1)

    def test_rows_of_one_image_widen_the_interval(self) -> None:
        rows = judged([("Unsafe", "Unsafe" if n % 2 else "Safe", None, None, NOTHING_WAIVED) for n in range(100)])

        def width(images: Any) -> float:
            found = compute_rates_by_waiver_kind(rows, Bootstrap(images, seed=0, resamples=400))["all"].recall
            return (found.high or 0) - (found.low or 0)

        apart, together = width(np.arange(100)), width(np.tile(np.arange(20), 5))
        assert together > 1.7 * apart, "five rows of an image are no five images (sqrt(5) would be 2.2)"

    def test_share_of_one_gets_wilsons_interval(self) -> None:
        rows = judged([("Unsafe", "Unsafe", None, None, NOTHING_WAIVED)] * 30)
        rates = compute_rates_by_waiver_kind(rows, bootstrap_of(rows))["all"]
        recall, f1 = rates.recall, rates.f1
        assert (f1.value, f1.low, f1.high) == (1.0, None, None)
        assert (recall.value, recall.high) == (1.0, pytest.approx(1.0))
        assert recall.low == pytest.approx(30 / (30 + 1.96**2), abs=1e-3), "Wilson's: n / (n + z^2)"

    def test_many_rows_get_fewer_resamples(self) -> None:
        assert Bootstrap(np.arange(1_000_000), seed=0).resamples == 200
        assert Bootstrap(np.arange(1000), seed=0).resamples == 1000

    def test_figure_text_has_value_and_interval(self) -> None:
        assert Metric(value=0.5, low=0.4, high=0.6).text() == "50.0 % (40.0 to 60.0)"
        assert Metric(value=0.5).text(percent=False) == "0.500"
        assert Metric(value=None, undefined="why").text() == "undefined"


def answer(rating: Rating | None, score: float | None = None, **fields: Any) -> Verdict:
    unreadable = {"outcome": "needs_review", "reason": "unreadable_answer", "category": None, "action": "review"}
    action = "block" if rating == "Unsafe" else "allow"
    given = {"rating": rating, "score": score, "category": O1 if rating == "Unsafe" else NO_CATEGORY, "action": action}
    return verdict_with(**(given | (unreadable if rating is None else {}) | fields))


def collected() -> ResultColumns:
    """Six images: with `adaptive` one is escalated, one missed; blurred, one flips to Safe and one to Unsafe."""
    columns = ResultColumns()
    rows: list[tuple[Rating, Verdict, Verdict, Verdict | None]] = [
        ("Unsafe", answer("Unsafe", 0.9), answer("Unsafe", 0.9, effort="full"), answer("Unsafe", 0.8)),
        ("Unsafe", answer("Unsafe", 0.7), answer("Safe", 0.05, effort="first_look"), answer("Safe", 0.4)),
        ("Unsafe", answer(None), answer(None, effort="full"), answer("Unsafe", 0.9)),
        ("Safe", answer("Safe", 0.1), answer("Safe", 0.1, effort="first_look"), answer("Unsafe", 0.6)),
        ("Safe", answer("Safe", 0.2), answer("Safe", 0.2, effort="first_look"), answer("Safe", 0.2)),
        ("Safe", answer("Safe", 0.2, timings_ms=Timings(total=900)), answer("Safe", 0.2, effort="first_look"), None),
    ]
    for n, (label, full, adaptive, blurred) in enumerate(rows):
        place = columns.add(LabelledImage(f"r{n}", f"s3://b/{n}", label, None), NOTHING_WAIVED, None, full)
        columns.add_adaptive(place, adaptive)
        if blurred:
            columns.add_perturbed(place, "blur", blurred)
    columns.fail("gone", "not_found", "there is no <b>such</b> key")
    return columns


def summary(columns: ResultColumns) -> EvaluationReport:
    return build_report(columns, data_set="d", policy="default@1", policy_thresholds=(0.5, 0.8), resamples=200)


class TestReport:
    def test_report_counts_rows_and_failures(self) -> None:
        report = summary(collected())
        assert (report.rows, report.judged, report.images, report.failures) == (7, 6, 6, {"not_found": 1})
        assert [(p.id, p.reason) for p in report.problems] == [("gone", "not_found")]
        assert report.rates["all"].confusion.unsafe_invalid == 1
        assert report.calibration.bins[9].rows == 1
        assert {t.threshold for t in report.thresholds} >= {0.5, 0.8, 0.05, 0.95}

    def test_adaptive_comparison_with_full_matches_hand_count(self) -> None:
        adaptive = summary(collected()).adaptive
        assert adaptive is not None
        assert (adaptive.rows, adaptive.escalated.value) == (6, pytest.approx(2 / 6))
        assert (adaptive.same_rating.value, adaptive.same_rating.of) == (pytest.approx(4 / 5), 5)
        assert adaptive.same_action.value == pytest.approx(5 / 6)
        assert (adaptive.missed.value, adaptive.missed.of) == (0.5, 2)
        assert adaptive.balanced_accuracy.value == pytest.approx((1 / 2 + 1) / 2)

    def test_robustness_flips_match_hand_count(self) -> None:
        (blur,) = summary(collected()).robustness
        assert (blur.rows, blur.flips.value) == (4, pytest.approx(2 / 4)), "unreadable before: no flip"
        assert (blur.to_safe.value, blur.to_unsafe.value) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
        assert blur.score_change.value == pytest.approx((0.1 + 0.3 + 0.5 + 0) / 4)

    def test_latency_percentiles_match_hand_count(self) -> None:
        total = next(each for each in summary(collected()).latency if each.step == "total")
        assert (total.percentiles[50].value, total.percentiles[99].value) == (165, 900)

    def test_summary_without_rows_has_only_undefined_figures(self) -> None:
        report = summary(ResultColumns())
        assert report.rates["all"].accuracy.value is None
        assert report.roc.area.undefined == "it takes Safe and Unsafe rows with a score"
        assert "NaN" not in report.model_dump_json()
        assert "undefined" in render_page(report)

    @pytest.mark.parametrize("only", ["Safe", "Unsafe"])
    def test_summary_of_one_class_defines_only_its_rates(self, only: Rating) -> None:
        columns = ResultColumns()
        for n in range(4):
            columns.add(LabelledImage(f"{n}", f"s3://b/{n}", only, None), NOTHING_WAIVED, None, answer("Safe", 0.1 * n))
        report = summary(columns)
        other = "recall" if only == "Safe" else "specificity"
        rates = report.rates["all"]
        assert getattr(rates, other).value is None
        assert rates.balanced_accuracy.undefined in {
            f"no {kind} row has an answer that could be read" for kind in ("Safe", "Unsafe")
        }
        assert rates.accuracy.value == (1 if only == "Safe" else 0)
        assert any("undefined: it takes Safe and Unsafe rows" in line for line in report.lines())
        assert "NaN" not in report.model_dump_json()
        assert render_page(report)

    def test_report_survives_json(self) -> None:
        report = summary(collected())
        assert EvaluationReport.model_validate_json(report.model_dump_json()) == report

    def test_page_is_reproducible_and_escapes_text_of_the_data_set(self) -> None:
        report = summary(collected())
        page = render_page(report, "A note & more.")
        assert page == render_page(EvaluationReport.model_validate_json(report.model_dump_json()), "A note & more.")
        assert "there is no &lt;b&gt;such&lt;/b&gt; key" in page
        assert "A note &amp; more." in page
        assert page.count("data:image/svg+xml;base64,") == len(draw_plots(report)) == 5
        assert "<script" not in page

    def test_summary_lines_have_the_main_figures(self) -> None:
        lines = "\n".join(summary(collected()).lines())
        for words in ("6 of 7 rows judged", "not judged: not_found 1", "count as neither: 1", "adaptive: escalated"):
            assert words in lines


class TestPerturbations:
    def test_perturbations_change_the_image_as_named(self) -> None:
        data = draw_image(1, size=(200, 100)).jpeg
        first, again = perturb(data, 1), perturb(data, 1)
        assert first == again
        assert len(first) == len(PERTURBATIONS)
        images = {n: Image.open(io.BytesIO(d)).convert("RGB") for n, d in zip(PERTURBATIONS, first, strict=True)}
        assert images["half the size"].size == (100, 50)
        assert images["a tenth cropped"].size == (180, 90)
        before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)

        def distance(name: str) -> float:
            return float(np.abs(np.asarray(images[name], np.float64) - before).mean())

        assert distance("saved again") < 2
        assert distance("JPEG quality 15") > distance("JPEG quality 40") > distance("saved again")
        # JPEG keeps the noise of luminance, 0.67 of the channels', whose mean distance is sqrt(2 / pi) deviations.
        assert distance("noise, deviation 20") == pytest.approx(20 * 0.67 * math.sqrt(2 / math.pi), rel=0.15)
        assert distance("blur, radius 2 %") > distance("blur, radius 1 %") > distance("saved again")
