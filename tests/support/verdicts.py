"""A verdict for tests, and variants of it."""

from datetime import UTC, datetime
from typing import Any

from services.core.messages import Timings, Verdict
from services.core.values import ModelIdentity, PolicyIdentity

NOW = datetime(2026, 11, 21, tzinfo=UTC)
MODEL = ModelIdentity(name="tiny", revision="r1", engine="sglang 0.5.23", prompt="sha256:p")
VERDICT = Verdict(
    verdict_id="7d9f",
    submission_id="upl-42",
    uri="s3://uploads/a.jpg",
    version_id=None,
    etag="e",
    sha256="5f70",
    tenant="shop",
    outcome="verdict",
    rating="Unsafe",
    category="O2: Violence, Harm, or Cruelty",
    rationale="A bloody knife.",
    score=0.97,
    action="block",
    policy=PolicyIdentity(name="default", version=1, digest="sha256:d"),
    model=MODEL,
    effort="full",
    image=None,
    timings_ms=Timings(total=165),
    metadata={"user": "u1"},
    submitted_at=NOW,
    judged_at=NOW,
)


def verdict_with(**fields: Any) -> Verdict:
    """The verdict with other values in some fields."""
    return VERDICT.model_copy(update=fields)
