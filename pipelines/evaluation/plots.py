"""Draws the plots of an evaluation as SVG. The same report gives the same bytes."""

import io
from collections.abc import Callable
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from pipelines.evaluation.curves import Curve
from pipelines.evaluation.report import EvaluationReport

_BLUE, _GREY, _RED = "#1d5fd0", "#6b7280", "#a11212"
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "sluice",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
}


def draw_plots(report: EvaluationReport) -> dict[str, bytes]:
    """The plots that the report has figures for, by title."""
    wanted: dict[str, tuple[bool, Callable[[Any], None]]] = {
        "ROC curve": (bool(report.roc.x), lambda axes: _roc(axes, report.roc)),
        "Precision and recall": (bool(report.roc.x), lambda axes: _precision(axes, report.precision_recall)),
        "Reliability": (any(b.rows for b in report.calibration.bins), lambda axes: _reliability(axes, report)),
        "Review load against misses": (bool(report.roc.x), lambda axes: _load(axes, report)),
        "Flips under perturbations": (bool(report.robustness), lambda axes: _flips(axes, report)),
    }
    return {title: _svg(plot) for title, (given, plot) in wanted.items() if given}


def _svg(plot: Callable[[Any], None]) -> bytes:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.4), layout="constrained")
        plot(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _roc(axes: Any, curve: Curve) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
    axes.plot(curve.x, curve.y, color=_BLUE)
    axes.set(xlabel="Safe images judged Unsafe", ylabel="Unsafe images found", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def _precision(axes: Any, curve: Curve) -> None:
    axes.plot(curve.x, curve.y, color=_BLUE)
    axes.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def _reliability(axes: Any, report: EvaluationReport) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
    for b in report.calibration.bins:
        if b.rows and b.unsafe.value is not None and b.mean_score is not None:
            if b.unsafe.low is not None and b.unsafe.high is not None:
                axes.plot([b.mean_score] * 2, [b.unsafe.low, b.unsafe.high], color=_BLUE, linewidth=1, alpha=0.5)
            axes.plot(b.mean_score, b.unsafe.value, "o", color=_BLUE, markersize=4)
            axes.annotate(f"{b.rows:,}", (b.mean_score, b.unsafe.value), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="mean score of the bin", ylabel="share that is Unsafe", xlim=(-0.02, 1.05), ylim=(-0.02, 1.08))


def _load(axes: Any, report: EvaluationReport) -> None:
    shown = [(t.threshold, t.load.value, t.misses.value) for t in report.thresholds]
    found = [(t, 100 * load, 100 * misses) for t, load, misses in shown if load is not None and misses is not None]
    axes.plot([load for _, load, _ in found], [misses for _, _, misses in found], "o-", color=_BLUE, markersize=3)
    for threshold, load, misses in found:
        if threshold in report.policy_thresholds:
            axes.plot(load, misses, "o", color=_RED)
            axes.annotate(f"{threshold:g}", (load, misses), (5, 5), textcoords="offset points", color=_RED)
    highest = max([misses for _, _, misses in found], default=0)
    axes.set(xlabel="% of all images to look at", ylabel="% of Unsafe images missed", xlim=(-2, 102))
    axes.set_ylim(-0.05, max(1.0, 1.1 * highest))


def _flips(axes: Any, report: EvaluationReport) -> None:
    found = [r for r in report.robustness if r.flips.value is not None][::-1]
    for index, robust in enumerate(found):
        value, low, high = (100 * (end or 0) for end in (robust.flips.value, robust.flips.low, robust.flips.high))
        axes.barh(index, value, color=_BLUE, height=0.6)
        axes.plot([low, high], [index, index], color=_GREY, linewidth=1)
    axes.set_yticks(range(len(found)), [robust.perturbation for robust in found])
    axes.set(xlabel="% of ratings that flip")
    axes.grid(visible=False, axis="y")
