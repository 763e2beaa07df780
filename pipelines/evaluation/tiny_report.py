"""`make evaluate`: writes the example page of the docs. The service judges drawings with the checkpoint `tiny`.

    python -m pipelines.evaluation.tiny_report FOLDER

Every image is judged under the default policy. As in LlavaGuard's data set, some violations are also judged under a
policy that waives their category, and under one that waives other categories.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import typer

from pipelines.evaluation.data_set_judge import EvaluationOptions
from pipelines.evaluation.html import render_page
from pipelines.evaluation.run import PAGE_NAME, DataSetSource, evaluate
from pipelines.local.backends import unset_settings
from pipelines.local.up import ShutdownRequested, run_service
from pipelines.reporting.timed_progress import TimedProgress
from pipelines.tiny_guard.drawings import draw
from services.core.errors import SluiceError
from services.core.text import escape_lines
from services.core.values import CATEGORIES, DEFAULT_POLICY, NO_CATEGORY

_FIRST_SEED: Final = 7_000_000
"""Training and the tests use other seeds."""
_CATEGORY_IMAGES: Final = 20
_HARMLESS_IMAGES: Final = 180
_WAIVED_IMAGES: Final = 12
"""Images of each category to judge twice more: with a policy that waives it, and with one that waives two others."""
_PERTURBED_IMAGES: Final = 80
_RESAMPLES: Final = 1000
_NAME: Final = "drawn-world"
_NOTE: Final = (
    "This is the checkpoint tiny on drawings that Sluice made itself. It is an example of a report and says "
    "nothing about LlavaGuard, which has to be evaluated on labelled photographs."
)


def write_data_set(folder: Path) -> None:
    """Write a data set of new drawings. As in LlavaGuard's, the suffix of an id defines what the policy waives."""
    rows: list[dict[str, Any]] = []
    labels = [label for _ in range(_CATEGORY_IMAGES) for label in CATEGORIES] + [NO_CATEGORY] * _HARMLESS_IMAGES
    # Both classes alternate, because the first images are the ones that are perturbed.
    order = sorted(range(len(labels)), key=lambda n: (n % (len(CATEGORIES) * _CATEGORY_IMAGES), n))
    for number in order:
        label, file = labels[number], f"{number:04d}.jpg"
        (folder / file).write_bytes(draw(_FIRST_SEED + number, label).jpeg)
        row = {"id": f"drawn_{number:04d}", "file_name": file, "category": label}
        rows.append(row | {"rating": "Safe" if label == NO_CATEGORY else "Unsafe"})
        if number < _WAIVED_IMAGES * len(CATEGORIES):
            index = CATEGORIES.index(label)
            others = [CATEGORIES[(index + step) % len(CATEGORIES)].partition(":")[0] for step in (2, 5)]
            rows.append(row | {"id": f"{row['id']}_v2", "rating": "Safe"})
            rows.append(row | {"id": f"{row['id']}_v3", "rating": "Unsafe", "waived": others})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Start the service on embedded backends, evaluate, and write the page."""
    out, progress = Path(sys.argv[1]), TimedProgress()
    unset_settings()
    try:
        with run_service(embed=True, progress=progress) as (settings, _), tempfile.TemporaryDirectory() as folder:
            data_set = Path(folder) / _NAME
            data_set.mkdir()
            write_data_set(data_set)
            report = evaluate(
                DataSetSource(data_set),
                DEFAULT_POLICY,
                settings,
                options=EvaluationOptions(adaptive=True, perturbed=_PERTURBED_IMAGES),
                out=out,
                resamples=_RESAMPLES,
                prevalence=None,
                progress=progress,
            )
            note = f"{_NOTE} The latencies are from {os.cpu_count()} cores at a load of {os.getloadavg()[1]:.0f}."
            (out / PAGE_NAME).write_text(render_page(report, note), encoding="utf-8")
    except ShutdownRequested:
        sys.exit(130)
    except SluiceError as error:
        sys.exit(escape_lines(f"sluice: {error}"))
    typer.echo("\n".join(report.lines()))  # each line is escaped


if __name__ == "__main__":
    main()
