"""Reconciliation: the matching is compared with a simple model, and the command runs on real streams."""

import asyncio
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dead_letters.replay import replay
from pipelines.dead_letters.stored import Selection
from pipelines.intake.crash_isolation import MAX_CRASHES
from pipelines.reconciliation import reconcile as reconciliation
from pipelines.reconciliation.matching import ReconciledSubmission, SubmissionMessage, SubmissionOutcome, match
from pipelines.reconciliation.reconcile import Finding, ReconciliationReport, TimeRange, reconcile
from services.core.messages import DeadLetter
from services.core.settings import Settings
from services.core.values import Assessment, Detail, PreparedImage
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.support.command_line import assert_fails, run_sluice_in
from tests.support.fake_guard import says_safe
from tests.support.intake_bench import IntakeBench

SETTLED_BEFORE_S = 5.0


def seen(key: bytes, published_at_s: float, in_range: bool = True) -> SubmissionMessage:
    return SubmissionMessage(key, published_at_s, in_range, "id", "uri", f"s/{published_at_s}")


def outcome(key: bytes, identity: str, is_first_pass: bool = True) -> SubmissionOutcome:
    return SubmissionOutcome(key, identity, "verdict", False, 0.0, is_first_pass, "id", "uri", "v/0/1", None)


KEYS = st.sampled_from([b"a", b"b", b"c"])
SUBMISSIONS = st.lists(st.builds(seen, KEYS, st.integers(0, 9).map(float), st.booleans()), max_size=8)
OUTCOMES = st.lists(st.builds(outcome, KEYS, st.sampled_from("xyz"), st.booleans()), max_size=8)


def matched(
    submissions: Sequence[SubmissionMessage], outcomes: Sequence[SubmissionOutcome]
) -> list[ReconciledSubmission]:
    in_order = (sorted(each, key=lambda one: one.key) for each in (submissions, outcomes))
    return list(match(*in_order, SETTLED_BEFORE_S))  # type: ignore[arg-type]


def fewest_conflicts(identities: Sequence[str], explained: int) -> int:
    """Try every choice of explained outcomes; return the lowest number of different outcomes that are not explained."""
    return min(
        len(set(identities) - set(chosen))
        for chosen in itertools.combinations(identities, min(explained, len(identities)))
    )


class TestMatching:
    @given(SUBMISSIONS, OUTCOMES)
    def test_match_any_messages_agrees_with_the_model(
        self, submissions: list[SubmissionMessage], outcomes: list[SubmissionOutcome]
    ) -> None:
        cases = matched(submissions, outcomes)
        assert len(cases) == len({each.key for each in [*submissions, *outcomes]})
        for case in cases:
            unmatched = [each for each in outcomes if each.key not in {one.key for one in submissions}]
            key = (*case.messages, *unmatched)[0].key
            mine = sorted((each for each in submissions if each.key == key), key=lambda each: each.published_at_s)
            read_first = [each.identity for each in outcomes if each.key == key and each.is_first_pass]
            late = [each.identity for each in outcomes if each.key == key and not each.is_first_pass]
            assert list(case.messages) == mine
            without = mine[len(read_first) + len(late) :]
            in_range = [each for each in without if each.in_range]
            assert list(case.lost) == [each for each in in_range if each.published_at_s < SETTLED_BEFORE_S]
            assert case.in_flight == len(in_range) - len(case.lost)
            known = read_first + late[: max(0, len(mine) - len(read_first))]
            assert sorted(each.identity for each in case.outcomes) == sorted(known) or not mine
            if any(each.in_range for each in mine):
                assert case.conflicting == fewest_conflicts(known, len(mine))
                assert case.repeated + case.conflicting == max(0, len(known) - len(mine))
            else:
                assert (case.repeated, case.conflicting, case.lost, case.in_flight) == (0, 0, (), 0)

    @given(st.lists(st.tuples(KEYS, st.integers(0, 4).map(float)), max_size=10))
    def test_match_one_outcome_for_each_submission_finds_nothing(self, submitted: list[tuple[bytes, float]]) -> None:
        outcomes = [outcome(key, f"{key!r} {number}") for number, (key, _) in enumerate(submitted)]
        for case in matched([seen(*each) for each in submitted], outcomes):
            assert (case.lost, case.in_flight, case.repeated, case.conflicting) == ((), 0, 0, 0)

    @given(st.lists(st.tuples(KEYS, st.integers(0, 4).map(float)), min_size=1, max_size=10), st.data())
    def test_match_submission_without_outcome_is_lost(
        self, submitted: list[tuple[bytes, float]], data: st.DataObject
    ) -> None:
        missing = data.draw(st.integers(0, len(submitted) - 1))
        outcomes = [outcome(key, "same") for number, (key, _) in enumerate(submitted) if number != missing]
        cases = matched([seen(*each) for each in submitted], outcomes)
        assert sum(len(case.lost) for case in cases) == 1
        assert {each.key for case in cases for each in case.lost} == {submitted[missing][0]}

    def test_match_repeated_conflict_counts_once_as_conflict(self) -> None:
        (case,) = matched([seen(b"a", 0)], [outcome(b"a", identity) for identity in "xxyy"])
        assert (case.conflicting, case.repeated) == (1, 2)

    def test_match_dead_letter_and_verdict_conflict_unless_submitted_twice(self) -> None:
        (case,) = matched([seen(b"a", 0)], [outcome(b"a", "verdict"), outcome(b"a", "dead letter")])
        assert (case.conflicting, case.repeated) == (1, 0)
        (case,) = matched([seen(b"a", 0), seen(b"a", 1)], [outcome(b"a", "verdict"), outcome(b"a", "dead letter")])
        assert (case.conflicting, case.repeated) == (0, 0), "the second submission may have another outcome"

    def test_match_outcomes_of_the_second_pass_fill_gaps_but_are_never_surplus(self) -> None:
        (case,) = matched(
            [seen(b"a", 0)], [outcome(b"a", "x", is_first_pass=False), outcome(b"a", "y", is_first_pass=False)]
        )
        assert (case.lost, case.repeated, case.conflicting) == ((), 0, 0)


def test_failure_names_lost_and_conflicting_and_with_exactly_once_repeats() -> None:
    assert ReconciliationReport().failure(exactly_once=True) is None
    assert ReconciliationReport(repeats=2, unexplained=1, in_flight=4).failure(exactly_once=False) is None
    assert "2 repeated outcomes" in str(ReconciliationReport(repeats=2).failure(exactly_once=True))
    assert ReconciliationReport(lost=1200, conflicting=1).failure(exactly_once=False) == (
        "found 1,200 submissions without an outcome, and 1 outcome in conflict with another outcome of the same "
        "submission; the findings name the submissions"
    )


@pytest.mark.parametrize("source", ["", "s", "s/x", "s/1-", "s/" + "9" * 99, "/1", "s/٣x"])
def test_parse_position_other_text_is_rejected(source: str) -> None:
    assert reconciliation._parse_position(source) is None


def test_parse_position_results_are_ordered_as_numbers() -> None:
    sources = ["s/99-7", "s/100-3", "s/100-12"]
    assert sorted(sources, key=lambda each: reconciliation._parse_position(each) or ("", ())) == sources


async def reconciled(
    settings: Settings, time_range: TimeRange | None = None, settle_s: float = 0
) -> tuple[ReconciliationReport, list[Finding]]:
    findings: list[Finding] = []
    result = await reconcile(
        settings, time_range or TimeRange(), settle_s=settle_s, write=findings.append, progress=lambda _: None
    )
    return result, findings


async def publish(settings: Settings, *records: OutgoingMessage) -> None:
    publisher = await open_publisher(StreamConfig.from_settings(settings))
    await publisher.publish(records)
    await publisher.close()


def submission(settings: Settings, name: str, **fields: Any) -> OutgoingMessage:
    document = {"id": name, "uri": f"s3://uploads/{name}.jpg"} | fields
    return OutgoingMessage(settings.submissions_stream, json.dumps(document).encode(), name.encode())


def verdict(settings: Settings, name: str, verdict_id: str = "v", **fields: Any) -> OutgoingMessage:
    document = {
        "verdict_id": verdict_id,
        "submission_id": name,
        "uri": f"s3://uploads/{name}.jpg",
        "outcome": "verdict",
        "submitted_at": datetime.now(UTC).isoformat(),
    }
    return OutgoingMessage(settings.verdicts_stream, json.dumps(document | fields).encode(), name.encode())


def dead_letter(settings: Settings, name: str, source: str = "s/0/0") -> OutgoingMessage:
    letter = DeadLetter(
        submission_id=name, reason="not_found", detail="x", attempts=1, source=source, failed_at=datetime.now(UTC)
    )
    return OutgoingMessage(
        settings.dead_letters_stream, submission(settings, name).value, name.encode(), letter.headers()
    )


def kinds(findings: list[Finding]) -> Counter[tuple[str, str | None]]:
    return Counter((each.finding, each.submission_id) for each in findings)


async def test_reconcile_every_kind_of_submission_has_one_outcome(bench: IntakeBench) -> None:
    await bench.start()
    for key in ("a.jpg", "b.jpg"):
        bench.put(key)
    record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "uploads"}, "object": {"key": "b.jpg"}}}
    removed = record | {"eventName": "ObjectRemoved:Delete"}
    absent = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "uploads"}, "object": {"key": "no.jpg"}}}
    await bench.submit({"id": "a", "uri": "s3://uploads/a.jpg"})
    await bench.submit({"id": "a", "uri": "s3://uploads/a.jpg"})
    await bench.submit({"id": "gone", "uri": "s3://uploads/not-there.jpg"})
    await bench.submit({"id": "no uri"})
    await bench.submit({"id": "no uri"})
    await bench.submit(b"not json")
    await bench.submit({"Records": [record, removed, absent, {"eventName": 7}, {"eventName": 8}]})
    await bench.submit({"Records": [removed]})
    await bench.settled(10)
    bench.put("not-there.jpg")
    await replay(bench.settings, Selection(), limit=None, dry_run=False, write=lambda _: None, progress=lambda _: None)
    await bench.settled(17)
    result, findings = await reconciled(bench.settings)
    assert findings == []
    assert result == ReconciliationReport(
        submissions=17,
        verdicts=Counter(verdict=4),
        dead_letters=Counter(malformed=10, not_found=3),
        ignored=1,
    )
    assert result.failure(exactly_once=True) is None


async def test_dead_letter_of_a_whole_message_is_the_outcome_of_each_record(bench: IntakeBench) -> None:
    records = [
        {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "uploads"}, "object": {"key": key}}}
        for key in ("a.jpg", "b.jpg")
    ]
    await bench.submit({"Records": [*records, {"eventName": 7}]})
    await bench.redis_cache.run(
        f"redis.call('SET', 'sluice:{bench.settings.group}:crashes:' .. ARGV[1], {MAX_CRASHES})",
        [],
        (await bench.read(bench.settings.submissions_stream))[0].source,
    )
    await bench.start()
    await bench.settled(1)
    result, findings = await reconciled(bench.settings)
    assert findings == []
    assert result == ReconciliationReport(submissions=3, dead_letters=Counter(guard_failed=3))


async def test_submission_without_outcome_is_in_flight_then_lost(bench: IntakeBench) -> None:
    release = asyncio.Event()

    async def hold(image: PreparedImage, detail: Detail) -> Assessment:
        await release.wait()
        return await says_safe(image, detail)

    bench.guard.script = hold
    await bench.start()
    bench.put("held.jpg")
    await bench.submit({"id": "held", "uri": "s3://uploads/held.jpg"})
    assert (await reconciled(bench.settings, settle_s=60))[0] == ReconciliationReport(submissions=1, in_flight=1)
    result, (finding,) = await reconciled(bench.settings)
    assert (result.lost, finding.finding, finding.submission_id) == (1, "lost", "held")
    assert finding.source is not None
    assert finding.source.startswith(bench.settings.submissions_stream)
    release.set()
    await bench.settled(1)
    assert (await reconciled(bench.settings))[0].lost == 0


async def test_repeated_conflicting_and_unexplained_outcomes_are_found(bench: IntakeBench) -> None:
    settings = bench.settings
    await publish(settings, *(submission(settings, name) for name in ("once", "twice", "two", "both", "none")))
    await publish(
        settings,
        *(verdict(settings, name) for name in ("once", "twice", "twice")),
        *(verdict(settings, "two", each) for each in ("v1", "v1", "v2")),
        verdict(settings, "both"),
        dead_letter(settings, "both"),
        verdict(settings, "stray\x1b"),
        OutgoingMessage(settings.verdicts_stream, b"\xff"),
        OutgoingMessage(settings.verdicts_stream, b"[1]"),
        OutgoingMessage(settings.dead_letters_stream, b"not one of Sluice's"),
    )
    result, findings = await reconciled(settings)
    assert kinds(findings) == {
        ("lost", "none"): 1,
        ("repeats", "twice"): 1,
        ("repeats", "two"): 1,
        ("conflicting", "two"): 1,
        ("conflicting", "both"): 1,
        ("unexplained", "stray\x1b"): 1,
        ("unreadable", None): 2,
    }
    assert (result.lost, result.repeats, result.conflicting, result.unexplained) == (1, 2, 2, 3)
    assert all(finding.line().isprintable() for finding in findings)
    (both,) = [each for each in findings if each.submission_id == "both"]
    assert set(both.ends) == {"verdict v", "dead letter not_found of s/0/0"}


async def test_reconcile_range_limits_the_submissions(bench: IntakeBench) -> None:
    settings = bench.settings
    await publish(settings, *(submission(settings, name) for name in ("before", "slow")))
    await asyncio.sleep(0.05)
    since = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await publish(settings, *(submission(settings, name) for name in ("in", "lost", "late")))
    await publish(settings, verdict(settings, "slow"), verdict(settings, "in"))
    await publish(settings, verdict(settings, "older", submitted_at="2020-01-01T00:00:00Z"))
    await asyncio.sleep(0.05)
    until = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await publish(settings, verdict(settings, "late"), submission(settings, "after"), verdict(settings, "unknown"))
    result, findings = await reconciled(settings, TimeRange(since, until))
    assert (result.submissions, result.verdicts, result.outside) == (3, Counter(verdict=2), 2)
    assert kinds(findings) == {("lost", "lost"): 1}
    assert (await reconciled(settings, TimeRange(since=datetime.now(UTC) + timedelta(hours=2))))[
        0
    ] == ReconciliationReport()
    everything, _ = await reconciled(settings)
    assert (everything.submissions, everything.lost, everything.unexplained) == (6, 3, 1)


async def test_outcomes_of_submissions_dropped_by_the_stream_are_outside(bench: IntakeBench) -> None:
    settings = bench.settings
    await publish(settings, submission(settings, "first"), verdict(settings, "first"))
    begin = f"{settings.submissions_stream}/1-0"
    await publish(settings, dead_letter(settings, "dropped", begin), dead_letter(settings, "forged", "nonsense"))
    result, findings = await reconciled(settings)
    assert kinds(findings) == {("unexplained", "forged"): 1}
    assert (result.outside, result.unexplained) == (1, 1)


async def test_reconcile_beside_a_running_service_finds_nothing(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publish submissions and verdicts between the passes of the command."""
    settings = bench.settings
    await publish(settings, submission(settings, "a"), verdict(settings, "a"), submission(settings, "b"))
    read = reconciliation._StreamCollector.collect_submissions

    async def meanwhile(self: Any) -> None:
        await publish(settings, submission(settings, "c"), verdict(settings, "c"))
        await read(self)
        await publish(settings, verdict(settings, "b"), verdict(settings, "c"), submission(settings, "d"))
        await publish(settings, verdict(settings, "d"))

    monkeypatch.setattr(reconciliation._StreamCollector, "collect_submissions", meanwhile)
    result, findings = await reconciled(settings)
    assert (result, findings) == (ReconciliationReport(submissions=3, verdicts=Counter(verdict=3)), [])


async def test_command_prints_findings_and_exits_with_1_if_any_is_lost(bench: IntakeBench, folder: Path) -> None:
    settings = bench.settings
    await publish(settings, submission(settings, "a"), verdict(settings, "a"), verdict(settings, "a"))
    fine = run_sluice_in(folder, "reconcile", "--settle-s", "0", "--json")
    assert fine.returncode == 0, fine.stderr
    finding, line = map(json.loads, fine.stdout.splitlines())
    assert (finding["finding"], finding["submission_id"], finding["count"]) == ("repeats", "a", 1)
    assert line == {
        "finding": "account",
        "submissions": 1,
        "verdicts": {"verdict": 2},
        "dead_letters": {},
        "lost": 0,
        "in_flight": 0,
        "repeats": 1,
        "conflicting": 0,
        "unexplained": 0,
        "outside": 0,
        "ignored": 0,
    }
    assert_fails(run_sluice_in(folder, "reconcile", "--since", "x"), "'x' is neither")

    await publish(settings, submission(settings, "evil\x1b[2J"))
    young = run_sluice_in(folder, "reconcile")
    assert (young.returncode, "in flight 1" in young.stdout.decode()) == (0, True)
    lost = run_sluice_in(folder, "reconcile", "--settle-s", "0")
    assert lost.returncode == 1
    assert lost.stderr.decode().splitlines()[-1] == (
        "sluice: found 1 submission without an outcome; the findings name the submissions"
    )
    assert "\x1b" not in lost.stdout.decode()
    assert "lost " in lost.stdout.decode().splitlines()[0]
    once = run_sluice_in(folder, "reconcile", SLUICE_DELIVERY="exactly_once")
    assert (once.returncode, "exactly_once" in once.stderr.decode()) == (1, True)


@pytest.mark.kafka
async def test_kafka_partitions_and_missing_topics_are_reconciled(bench: IntakeBench, kafka_address: str) -> None:
    """Several partitions, and topics that do not exist yet."""
    name = f"reconcile-{uuid.uuid4().hex[:8]}"
    settings = bench.settings = bench.settings.model_copy(
        update={
            "stream_url": f"kafka://{kafka_address}",
            "kafka_partitions": 3,
            "submissions_stream": f"{name}.submissions",
            "backfill_stream": f"{name}.backfill",
        }
    )
    assert (await reconciled(settings))[0] == ReconciliationReport()
    names = [f"n-{number}" for number in range(30)]
    await publish(settings, *(submission(settings, each) for each in names))
    await publish(settings, OutgoingMessage(settings.submissions_stream, b"not json", b"k"))
    intake = await bench.start()
    await bench.settled(31, stalled_s=90)
    await intake.drain()
    result, findings = await reconciled(settings)
    assert (result, findings) == (
        ReconciliationReport(submissions=31, dead_letters=Counter(not_found=30, malformed=1)),
        [],
    )
    await publish(settings, dead_letter(settings, "n-3"), submission(settings, "lost"), verdict(settings, "stray"))
    _, findings = await reconciled(settings)
    assert kinds(findings) == {("conflicting", "n-3"): 1, ("lost", "lost"): 1, ("unexplained", "stray"): 1}
