"""Renders the report of an evaluation as one self-contained HTML document without scripts."""

import base64
from pathlib import Path
from typing import Final

from pipelines.evaluation.plots import draw_plots
from pipelines.evaluation.report import EvaluationReport
from pipelines.reporting.html import load_template


def render_page(report: EvaluationReport, note: str = "") -> str:
    """The page. The same report gives the same bytes. `note` is shown at the top."""
    plots = {title: base64.b64encode(svg).decode() for title, svg in draw_plots(report).items()}
    return _TEMPLATE.render(report=report, plots=plots, note=note)


_TEMPLATE: Final = load_template(Path(__file__).with_name("page.html.jinja"))
