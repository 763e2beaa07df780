"""The summary of a run: counts, scores and errors, as JSON and as an HTML page."""

import base64
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipelines.annotation.curate import CuratedSet
from pipelines.reporting.html import load_template

_HISTOGRAM_BINS: Final = 50
SUMMARY_COLUMNS: Final = ["outcome", "reason", "detail", "rating", "category", "score", "action", "duplicate_of"]
_EXAMPLES_PER_ERROR: Final = 3


class SummaryCounts:
    """Counts annotations. Memory does not grow with their number."""

    def __init__(self) -> None:
        self.rows = 0
        self.duplicates = 0
        self.by_column: dict[str, Counter[str]] = {
            name: Counter() for name in ("outcome", "rating", "category", "action")
        }
        self.reasons: Counter[str] = Counter()
        self.error_examples: dict[str, list[str]] = {}
        self.scores = [0] * _HISTOGRAM_BINS

    def add(self, rows: pa.Table) -> None:
        """Count annotations with the columns `SUMMARY_COLUMNS`."""
        self.rows += rows.num_rows
        self.duplicates += rows.num_rows - rows.column("duplicate_of").null_count
        for name, counter in self.by_column.items():
            counter.update(value for value in rows.column(name).to_pylist() if value is not None)
        for reason, detail in zip(rows.column("reason").to_pylist(), rows.column("detail").to_pylist(), strict=True):
            if reason is not None:
                self.reasons[reason] += 1
                examples = self.error_examples.setdefault(reason, [])
                if detail and len(examples) < _EXAMPLES_PER_ERROR and detail not in examples:
                    examples.append(detail)
        for score in rows.column("score").to_pylist():
            if score is not None:
                self.scores[min(int(score * _HISTOGRAM_BINS), _HISTOGRAM_BINS - 1)] += 1

    def to_json(self) -> dict[str, Any]:
        """The counts. `score_histogram` has bins of equal width from 0 to 1."""
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            **{name: dict(counter.most_common()) for name, counter in self.by_column.items()},
            "errors": {
                reason: {"rows": rows, "examples": self.error_examples.get(reason, [])}
                for reason, rows in self.reasons.most_common()
            },
            "score_histogram": self.scores,
        }


def format_summary(summary: dict[str, Any], curated: CuratedSet | None) -> list[str]:
    """The counts as lines for a terminal, and the size of the curated set if there is one."""
    counted = [
        (name, value, rows)
        for name in ("outcome", "rating", "category", "action")
        for value, rows in summary[name].items()
    ]
    counted += [("error", reason, found["rows"]) for reason, found in summary["errors"].items()]
    if curated:
        counted.append(("curated", f"in {curated.files} files", curated.images))
    return [f"{name:<9} {value:<42} {rows:>12,}" for name, value, rows in counted]


def add_curated(summary: dict[str, Any], curated: CuratedSet | None) -> dict[str, Any]:
    """The summary with the size of the curated set, if there is one."""
    if not curated:
        return summary
    return summary | {"curated": {"images": curated.images, "files": curated.files, "lost": curated.unreadable}}


def render_page(summary: dict[str, Any]) -> str:
    """The summary as one self-contained HTML document."""
    return _TEMPLATE.render(summary=summary, histogram=base64.b64encode(_draw_histogram(summary)).decode())


def _draw_histogram(summary: dict[str, Any]) -> bytes:
    """A histogram of the scores, as PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - it takes a second, and only this needs it

    counts: Iterable[int] = summary["score_histogram"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        [(n + 0.5) / _HISTOGRAM_BINS for n in range(_HISTOGRAM_BINS)],
        list(counts),
        width=1 / _HISTOGRAM_BINS,
        color="#35618f",
    )
    if any(counts):
        axes.set_yscale("symlog")
    axes.set(xlim=(0, 1), xlabel="score, P(Unsafe)", ylabel="images")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


_TEMPLATE: Final = load_template(Path(__file__).with_name("summary.html.jinja"))
