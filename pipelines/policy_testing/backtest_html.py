"""The page of a backtest: a self-contained HTML document.

Ids, URIs, rationales and pictures are untrusted: text is escaped, there are no links, and the page's
Content-Security-Policy forbids loading and scripts.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipelines.policy_testing.backtest_report import BacktestReport, Flip, FlipGroup, VerdictPair
from pipelines.reporting.html import load_template

PICTURES_LIMIT: Final = 200
"""Pictures on one page: at some 20 KB each, a few MB that a phone still opens."""


@dataclass(frozen=True, slots=True)
class _ShownFlip:
    flip: Flip
    picture: str | None
    """Base64 of a JPEG."""


@dataclass(frozen=True, slots=True)
class _ShownGroup:
    group: FlipGroup
    flips: tuple[_ShownFlip, ...]


def render_page(report: BacktestReport, pairs: Sequence[VerdictPair], *, exceeded: Sequence[str] = ()) -> str:
    """The page: one self-contained HTML document, without scripts.

    Args:
        report: the report on `pairs`.
        pairs: the pairs with their pictures. At most `PICTURES_LIMIT` are shown, in the order of the flips.
        exceeded: the sentences of `BacktestReport.exceeded`, shown first.
    """
    groups, without_picture = _groups_with_pictures(report, pairs)
    return _TEMPLATE.render(
        report=report, groups=groups, exceeded=exceeded, limit=PICTURES_LIMIT, without_picture=without_picture
    )


def _groups_with_pictures(report: BacktestReport, pairs: Sequence[VerdictPair]) -> tuple[list[_ShownGroup], int]:
    """The groups with pictures up to the limit, and the number of pictures beyond it."""
    pictures = {(pair.submission_id, pair.uri): pair.picture for pair in pairs if pair.picture}
    groups, shown, without = [], 0, 0
    for group in report.flip_groups:
        flips = []
        for flip in group.flips:
            picture = pictures.get((flip.submission_id, flip.uri))
            if picture and shown == PICTURES_LIMIT:
                picture, without = None, without + 1
            shown += picture is not None
            flips.append(_ShownFlip(flip, base64.b64encode(picture).decode() if picture else None))
        groups.append(_ShownGroup(group, tuple(flips)))
    return groups, without


_TEMPLATE: Final = load_template(Path(__file__).with_name("backtest.html.jinja"))
