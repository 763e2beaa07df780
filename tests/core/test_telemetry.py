"""Counting functions write the names of this release and the names of the release before."""

from typing import Any

import pytest
from ray.util.metrics import Counter

from services.core import telemetry
from services.core.errors import StoreUnavailable

Counted = list[tuple[str, dict[str, str]]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The name and the labels of every counter that is increased. Ray's own check of the labels still runs."""
    found: Counted = []
    increase = Counter.inc

    def record(self: Counter, value: float = 1.0, tags: dict[str, str] | None = None, **rest: Any) -> None:
        increase(self, value, tags, **rest)
        found.append((self.info["name"], dict(tags or {})))

    monkeypatch.setattr(Counter, "inc", record)
    return found


def test_count_retry_increases_new_and_former_counter(counted: Counted) -> None:
    telemetry.count_retry(StoreUnavailable("S3 does not answer"))

    labels = {"error": "StoreUnavailable"}
    assert counted == [("sluice_retries_total", labels), ("sluice_waits_total", labels)]


@pytest.mark.parametrize(
    ("result", "reason", "label"),
    [
        ("verdict", None, ""),
        ("needs_review", "blocked", "blocked"),
        ("needs_review", "quota", "circuit_breaker"),
        ("dead_letter", "not_found", "not_found"),
    ],
)
def test_count_result_writes_new_and_former_label(
    counted: Counted, result: str, reason: str | None, label: str
) -> None:
    telemetry.count_result(result, reason)

    assert counted == [("sluice_submissions_total", {"result": result, "reason": label, "end": result})]
