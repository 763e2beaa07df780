"""What of two verdicts on the same image counts as the same."""

from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.policy_testing import rejudge as replaying
from pipelines.policy_testing.rejudge import FieldDifference, RejudgedVerdict, compare, find_verdict, rejudge
from services.core.errors import ConfigurationError, SluiceError
from services.core.messages import Timings, Verdict
from services.core.values import ModelIdentity, PolicyIdentity
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.support.intake_bench import IntakeBench

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


def changed(**fields: Any) -> Verdict:
    return VERDICT.model_copy(update=fields)


class TestCompare:
    def test_the_same_again(self) -> None:
        later = changed(judged_at=datetime(2027, 1, 1, tzinfo=UTC), timings_ms=Timings(), metadata={}, score=0.9706)
        assert compare(VERDICT, later) == []

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("sha256", "other"),
            ("outcome", "needs_review"),
            ("reason", "unreadable_answer"),
            ("rating", "Safe"),
            ("category", "O6: Weapons or Substance Abuse"),
            ("rationale", "A knife."),
            ("rationale", None),
            ("score", 0.9685),
            ("score", None),
            ("action", "review"),
            ("effort", "first_look"),
        ],
    )
    def test_whatever_differs(self, field: str, value: Any) -> None:
        assert compare(VERDICT, changed(**{field: value})) == [FieldDifference(field, getattr(VERDICT, field), value)]

    @pytest.mark.parametrize("field", ["name", "revision", "engine", "prompt"])
    def test_what_judged(self, field: str) -> None:
        after = changed(model=MODEL.model_copy(update={field: "other"}))
        assert compare(VERDICT, after) == [FieldDifference(f"model.{field}", getattr(MODEL, field), "other")]

    def test_a_policy_bucket_with_another_content(self) -> None:
        after = changed(policy=PolicyIdentity(name="default", version=1, digest="sha256:x"))
        assert [str(difference) for difference in compare(VERDICT, after)] == [
            "policy.digest: was sha256:d, is sha256:x"
        ]

    def test_an_answer_that_is_unreadable_both_times(self) -> None:
        unreadable = changed(
            outcome="needs_review", reason="unreadable_answer", rating=None, category=None, score=None, action="review"
        )
        assert compare(unreadable, unreadable) == []

    def test_a_block_that_the_circuit_breaker_held_back(self) -> None:
        held_back = changed(outcome="needs_review", reason="quota", action="review")
        assert compare(held_back, VERDICT) == []
        assert [d.field for d in compare(held_back, changed(action="review", score=0.6))] == ["score", "action"]


@pytest.mark.parametrize(("value", "shown"), [(None, "nothing"), (0.97001, "0.9700"), ("block", "block")])
def test_a_difference_is_readable(value: Any, shown: str) -> None:
    assert str(FieldDifference("score", value, 0.5)) == f"score: was {shown}, is 0.5000"


def test_notes() -> None:
    newer = changed(model=MODEL.model_copy(update={"revision": "r2", "engine": "sglang 1"}))
    engine = changed(model=MODEL.model_copy(update={"engine": "sglang 1"}))
    held_back = changed(outcome="needs_review", reason="quota", action="review")
    for before, after, words in (
        (VERDICT, newer, ["another model"]),
        (VERDICT, engine, ["another engine"]),
        (held_back, VERDICT, ["circuit breaker"]),
        (VERDICT, VERDICT, []),
    ):
        notes = replaying.notes(before, after)
        assert len(notes) == len(words)
        assert all(word in note for word, note in zip(words, notes, strict=True))
    assert RejudgedVerdict(VERDICT, VERDICT, (), ()).reproduced


def test_nothing_was_judged(bench: IntakeBench) -> None:
    overtaken = changed(outcome="superseded", policy=None, model=None, rating=None, category=None, score=None)
    with pytest.raises(SluiceError, match="superseded: a later object took the place"):
        rejudge(overtaken, bench.settings, print)


async def test_finds_the_newest(bench: IntakeBench) -> None:
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    stream = bench.settings.verdicts_stream
    found = [changed(), changed(score=0.5), changed(verdict_id="other"), changed(verdict_id="b", uri="s3://u/7d9f")]
    await publisher.publish([OutgoingMessage(stream, verdict.model_dump_json().encode()) for verdict in found])
    await publisher.close()
    assert (await find_verdict("7d9f", bench.settings)).score == 0.5
    assert (await find_verdict("b", bench.settings)).uri == "s3://u/7d9f"
    with pytest.raises(ConfigurationError, match="there is no verdict 7d"):
        await find_verdict("7d", bench.settings)
