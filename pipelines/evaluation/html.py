"""The page of an evaluation: one HTML document that needs nothing but itself, and runs no scripts."""

import base64
from pathlib import Path
from typing import Final

from pipelines.evaluation.plots import draw
from pipelines.evaluation.report import EvaluationReport
from pipelines.reporting.html import html_template


def render(report: EvaluationReport, note: str = "") -> str:
    """The page; the same report gives the same bytes. `note` is a sentence to begin with."""
    plots = {title: base64.b64encode(svg).decode() for title, svg in draw(report).items()}
    return _TEMPLATE.render(report=report, plots=plots, note=note)


_TEMPLATE: Final = html_template(Path(__file__).with_name("page.html.jinja"))
