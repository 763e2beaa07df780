"""The comparison of two verdicts on the same image, and the errors of a replay."""

from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.policy_testing import rejudge as replaying
from pipelines.policy_testing.rejudge import FieldDifference, RejudgedVerdict, compare, find_verdict, rejudge
from services.core.errors import ConfigurationError, SluiceError
from services.core.messages import Timings
from services.core.values import PolicyIdentity
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.support.intake_bench import IntakeBench
from tests.support.verdicts import MODEL, VERDICT, verdict_with


class TestCompare:
    def test_same_verdict_has_no_difference(self) -> None:
        later = verdict_with(
            judged_at=datetime(2027, 1, 1, tzinfo=UTC), timings_ms=Timings(), metadata={}, score=0.9706
        )
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
    def test_changed_answer_is_a_difference(self, field: str, value: Any) -> None:
        assert compare(VERDICT, verdict_with(**{field: value})) == [
            FieldDifference(field, getattr(VERDICT, field), value)
        ]

    @pytest.mark.parametrize("field", ["name", "revision", "engine", "prompt"])
    def test_changed_policy_or_model_is_a_difference(self, field: str) -> None:
        after = verdict_with(model=MODEL.model_copy(update={field: "other"}))
        assert compare(VERDICT, after) == [FieldDifference(f"model.{field}", getattr(MODEL, field), "other")]

    def test_changed_policy_digest_is_a_difference(self) -> None:
        after = verdict_with(policy=PolicyIdentity(name="default", version=1, digest="sha256:x"))
        assert [str(difference) for difference in compare(VERDICT, after)] == [
            "policy.digest: was sha256:d, is sha256:x"
        ]

    def test_unreadable_answer_twice_is_no_difference(self) -> None:
        unreadable = verdict_with(
            outcome="needs_review", reason="unreadable_answer", rating=None, category=None, score=None, action="review"
        )
        assert compare(unreadable, unreadable) == []

    def test_block_held_back_by_circuit_breaker_is_no_difference(self) -> None:
        held_back = verdict_with(outcome="needs_review", reason="quota", action="review")
        assert compare(held_back, VERDICT) == []
        assert [d.field for d in compare(held_back, verdict_with(action="review", score=0.6))] == ["score", "action"]


@pytest.mark.parametrize(("value", "shown"), [(None, "nothing"), (0.97001, "0.9700"), ("block", "block")])
def test_field_difference_text_has_both_values(value: Any, shown: str) -> None:
    assert str(FieldDifference("score", value, 0.5)) == f"score: was {shown}, is 0.5000"


def test_explanations_name_breaker_model_and_engine() -> None:
    newer = verdict_with(model=MODEL.model_copy(update={"revision": "r2", "engine": "sglang 1"}))
    engine = verdict_with(model=MODEL.model_copy(update={"engine": "sglang 1"}))
    held_back = verdict_with(outcome="needs_review", reason="quota", action="review")
    for before, after, words in (
        (VERDICT, newer, ["another model"]),
        (VERDICT, engine, ["another engine"]),
        (held_back, VERDICT, ["circuit breaker"]),
        (VERDICT, VERDICT, []),
    ):
        notes = replaying.explain(before, after)
        assert len(notes) == len(words)
        assert all(word in note for word, note in zip(words, notes, strict=True))
    assert RejudgedVerdict(VERDICT, VERDICT, (), ()).reproduced


def test_rejudge_of_a_superseded_verdict_fails(bench: IntakeBench) -> None:
    overtaken = verdict_with(outcome="superseded", policy=None, model=None, rating=None, category=None, score=None)
    with pytest.raises(SluiceError, match="superseded: a newer version of the object arrived"):
        rejudge(overtaken, bench.settings, print)


async def test_newest_verdict_of_an_id_is_found(bench: IntakeBench) -> None:
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    stream = bench.settings.verdicts_stream
    found = [
        verdict_with(),
        verdict_with(score=0.5),
        verdict_with(verdict_id="other"),
        verdict_with(verdict_id="b", uri="s3://u/7d9f"),
    ]
    await publisher.publish([OutgoingMessage(stream, verdict.model_dump_json().encode()) for verdict in found])
    await publisher.close()
    assert (await find_verdict("7d9f", bench.settings)).score == 0.5
    assert (await find_verdict("b", bench.settings)).uri == "s3://u/7d9f"
    with pytest.raises(ConfigurationError, match="there is no verdict 7d"):
        await find_verdict("7d", bench.settings)
