"""Every submission has exactly one end: the matching against a model of it, and the command on real streams."""

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

from pipelines.dead_letters.replay import Selection, replay
from pipelines.intake.crash_isolation import MAX_CRASHES
from pipelines.reconciliation import reconcile as reconciliation
from pipelines.reconciliation.matching import ReconciledSubmission, SeenSubmission, SubmissionOutcome, match
from pipelines.reconciliation.reconcile import Finding, ReconciliationReport, Span, reconcile
from services.core.messages import DeadLetter
from services.core.settings import Settings
from services.core.values import Assessment, Detail, PreparedImage
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.cli.test_command_line import fails, folder, sluice
from tests.support.fake_guard import says_safe
from tests.support.intake_bench import Bench

__all__ = ["folder"]

SETTLED_BEFORE = 5.0


def occurrence(key: bytes, at: float, counted: bool = True) -> SeenSubmission:
    return SeenSubmission(key, at, counted, "id", "uri", f"s/{at}")


def end(key: bytes, identity: str, read_first: bool = True) -> SubmissionOutcome:
    return SubmissionOutcome(key, identity, "verdict", False, 0.0, read_first, "id", "uri", "v/0/1", None)


KEYS = st.sampled_from([b"a", b"b", b"c"])
OCCURRENCES = st.lists(st.builds(occurrence, KEYS, st.integers(0, 9).map(float), st.booleans()), max_size=8)
ENDS = st.lists(st.builds(end, KEYS, st.sampled_from("xyz"), st.booleans()), max_size=8)


def matched(occurrences: Sequence[SeenSubmission], ends: Sequence[SubmissionOutcome]) -> list[ReconciledSubmission]:
    in_order = (sorted(each, key=lambda one: one.key) for each in (occurrences, ends))
    return list(match(*in_order, SETTLED_BEFORE))  # type: ignore[arg-type]


def fewest_conflicts(identities: Sequence[str], explained: int) -> int:
    """Try every way to choose the ends that the occurrences explain; what is unlike all of them conflicts, once."""
    return min(
        len(set(identities) - set(chosen))
        for chosen in itertools.combinations(identities, min(explained, len(identities)))
    )


class TestMatching:
    @given(OCCURRENCES, ENDS)
    def test_as_the_model_has_it(self, occurrences: list[SeenSubmission], ends: list[SubmissionOutcome]) -> None:
        cases = matched(occurrences, ends)
        assert len(cases) == len({each.key for each in [*occurrences, *ends]})
        for case in cases:
            key = (*case.occurrences, *[each for each in ends if each.key not in {o.key for o in occurrences}])[0].key
            mine = sorted((each for each in occurrences if each.key == key), key=lambda each: each.at)
            read_first = [each.identity for each in ends if each.key == key and each.read_first]
            late = [each.identity for each in ends if each.key == key and not each.read_first]
            assert list(case.occurrences) == mine
            without = mine[len(read_first) + len(late) :]
            counted = [each for each in without if each.counted]
            assert list(case.lost) == [each for each in counted if each.at < SETTLED_BEFORE]
            assert case.in_flight == len(counted) - len(case.lost)
            known = read_first + late[: max(0, len(mine) - len(read_first))]
            assert sorted(each.identity for each in case.ends) == sorted(known) or not mine
            if any(each.counted for each in mine):
                assert case.conflicting == fewest_conflicts(known, len(mine))
                assert case.repeats + case.conflicting == max(0, len(known) - len(mine))
            else:
                assert (case.repeats, case.conflicting, case.lost, case.in_flight) == (0, 0, (), 0)

    @given(st.lists(st.tuples(KEYS, st.integers(0, 4).map(float)), max_size=10))
    def test_one_end_each_is_all_there_is_to_it(self, submitted: list[tuple[bytes, float]]) -> None:
        ends = [end(key, f"{key!r} {number}") for number, (key, _) in enumerate(submitted)]
        for case in matched([occurrence(*each) for each in submitted], ends):
            assert (case.lost, case.in_flight, case.repeats, case.conflicting) == ((), 0, 0, 0)

    @given(st.lists(st.tuples(KEYS, st.integers(0, 4).map(float)), min_size=1, max_size=10), st.data())
    def test_one_that_is_missing_is_found(self, submitted: list[tuple[bytes, float]], data: st.DataObject) -> None:
        gone = data.draw(st.integers(0, len(submitted) - 1))
        ends = [end(key, "same") for number, (key, _) in enumerate(submitted) if number != gone]
        cases = matched([occurrence(*each) for each in submitted], ends)
        assert sum(len(case.lost) for case in cases) == 1
        assert {each.key for case in cases for each in case.lost} == {submitted[gone][0]}

    def test_a_conflict_that_is_repeated(self) -> None:
        (case,) = matched([occurrence(b"a", 0)], [end(b"a", identity) for identity in "xxyy"])
        assert (case.conflicting, case.repeats) == (1, 2)

    def test_a_dead_letter_and_a_verdict(self) -> None:
        (case,) = matched([occurrence(b"a", 0)], [end(b"a", "verdict"), end(b"a", "dead letter")])
        assert (case.conflicting, case.repeats) == (1, 0)
        (case,) = matched([occurrence(b"a", 0), occurrence(b"a", 1)], [end(b"a", "verdict"), end(b"a", "dead letter")])
        assert (case.conflicting, case.repeats) == (0, 0), "submitted again, a dead letter may well become a verdict"

    def test_what_came_while_reading_fills_gaps_but_is_never_too_much(self) -> None:
        (case,) = matched([occurrence(b"a", 0)], [end(b"a", "x", read_first=False), end(b"a", "y", read_first=False)])
        assert (case.lost, case.repeats, case.conflicting) == ((), 0, 0)


def test_the_sentence() -> None:
    assert ReconciliationReport().wrong(exactly_once=True) is None
    assert ReconciliationReport(repeats=2, unexplained=1, in_flight=4).wrong(exactly_once=False) is None
    assert "2 ends are repeated" in str(ReconciliationReport(repeats=2).wrong(exactly_once=True))
    assert ReconciliationReport(lost=1200, conflicting=1).wrong(exactly_once=False) == (
        "1,200 submissions have no end, and 1 ends contradict another end of the same submission"
    )


@pytest.mark.parametrize("source", ["", "s", "s/x", "s/1-", "s/" + "9" * 99, "/1", "s/٣x"])
def test_no_place(source: str) -> None:
    assert reconciliation._place(source) is None


def test_places_are_in_order() -> None:
    sources = ["s/99-7", "s/100-3", "s/100-12"]
    assert sorted(sources, key=lambda each: reconciliation._place(each) or ("", ())) == sources


async def account(
    settings: Settings, span: Span | None = None, settle_s: float = 0
) -> tuple[ReconciliationReport, list[Finding]]:
    findings: list[Finding] = []
    result = await reconcile(
        settings, span or Span(), settle_s=settle_s, write=findings.append, progress=lambda _: None
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


async def test_everything_that_can_come_of_a_submission(bench: Bench) -> None:
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
    result, findings = await account(bench.settings)
    assert findings == []
    assert result == ReconciliationReport(
        submissions=17,
        verdicts=Counter(verdict=4),
        dead_letters=Counter(malformed=10, not_found=3),
        ignored=1,
    )
    assert result.wrong(exactly_once=True) is None


async def test_a_message_that_was_given_up_whole_ends_all_of_its_submissions(bench: Bench) -> None:
    records = [
        {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "uploads"}, "object": {"key": key}}}
        for key in ("a.jpg", "b.jpg")
    ]
    await bench.submit({"Records": [*records, {"eventName": 7}]})
    await bench.shared.run(
        f"redis.call('SET', 'sluice:{bench.settings.group}:crashes:' .. ARGV[1], {MAX_CRASHES})",
        [],
        (await bench.read(bench.settings.submissions_stream))[0].source,
    )
    await bench.start()
    await bench.settled(1)
    result, findings = await account(bench.settings)
    assert findings == []
    assert result == ReconciliationReport(submissions=3, dead_letters=Counter(guard_failed=3))


async def test_lost_and_in_flight(bench: Bench) -> None:
    release = asyncio.Event()

    async def hold(image: PreparedImage, detail: Detail) -> Assessment:
        await release.wait()
        return await says_safe(image, detail)

    bench.guard.script = hold
    await bench.start()
    bench.put("held.jpg")
    await bench.submit({"id": "held", "uri": "s3://uploads/held.jpg"})
    assert (await account(bench.settings, settle_s=60))[0] == ReconciliationReport(submissions=1, in_flight=1)
    result, (finding,) = await account(bench.settings)
    assert (result.lost, finding.finding, finding.submission_id) == (1, "lost", "held")
    assert finding.source is not None
    assert finding.source.startswith(bench.settings.submissions_stream)
    release.set()
    await bench.settled(1)
    assert (await account(bench.settings))[0].lost == 0


async def test_repeats_conflicts_and_what_nobody_asked_for(bench: Bench) -> None:
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
    result, findings = await account(settings)
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


async def test_a_range(bench: Bench) -> None:
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
    result, findings = await account(settings, Span(since, until))
    assert (result.submissions, result.verdicts, result.outside) == (3, Counter(verdict=2), 2)
    assert kinds(findings) == {("lost", "lost"): 1}
    assert (await account(settings, Span(since=datetime.now(UTC) + timedelta(hours=2))))[0] == ReconciliationReport()
    everything, _ = await account(settings)
    assert (everything.submissions, everything.lost, everything.unexplained) == (6, 3, 1)


async def test_ends_whose_submissions_the_stream_has_dropped(bench: Bench) -> None:
    settings = bench.settings
    await publish(settings, submission(settings, "first"), verdict(settings, "first"))
    begin = f"{settings.submissions_stream}/1-0"
    await publish(settings, dead_letter(settings, "dropped", begin), dead_letter(settings, "forged", "nonsense"))
    result, findings = await account(settings)
    assert kinds(findings) == {("unexplained", "forged"): 1}
    assert (result.outside, result.unexplained) == (1, 1)


async def test_a_service_that_goes_on_while_it_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings, submissions come and end: nothing of that is a finding."""
    settings = bench.settings
    await publish(settings, submission(settings, "a"), verdict(settings, "a"), submission(settings, "b"))
    read = reconciliation._Reading.read_submissions

    async def meanwhile(self: Any) -> None:
        await publish(settings, submission(settings, "c"), verdict(settings, "c"))
        await read(self)
        await publish(settings, verdict(settings, "b"), verdict(settings, "c"), submission(settings, "d"))
        await publish(settings, verdict(settings, "d"))

    monkeypatch.setattr(reconciliation._Reading, "read_submissions", meanwhile)
    result, findings = await account(settings)
    assert (result, findings) == (ReconciliationReport(submissions=3, verdicts=Counter(verdict=3)), [])


async def test_from_outside(bench: Bench, folder: Path) -> None:
    settings = bench.settings
    await publish(settings, submission(settings, "a"), verdict(settings, "a"), verdict(settings, "a"))
    fine = sluice("reconcile", "--settle-s", "0", "--json", folder=folder)
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
    fails(sluice("reconcile", "--since", "x", folder=folder), "'x' is neither")

    await publish(settings, submission(settings, "evil\x1b[2J"))
    young = sluice("reconcile", folder=folder)
    assert (young.returncode, "in flight 1" in young.stdout.decode()) == (0, True)
    lost = sluice("reconcile", "--settle-s", "0", folder=folder)
    assert lost.returncode == 1
    assert lost.stderr.decode().splitlines()[-1] == "sluice: 1 submissions have no end"
    assert "\x1b" not in lost.stdout.decode()
    assert "lost " in lost.stdout.decode().splitlines()[0]
    once = sluice("reconcile", folder=folder, SLUICE_DELIVERY="exactly_once")
    assert (once.returncode, "exactly_once" in once.stderr.decode()) == (1, True)


@pytest.mark.kafka
async def test_on_kafka(bench: Bench, kafka_address: str) -> None:
    """Several partitions, and topics that are missing."""
    name = f"reconcile-{uuid.uuid4().hex[:8]}"
    settings = bench.settings = bench.settings.model_copy(
        update={
            "stream_url": f"kafka://{kafka_address}",
            "kafka_partitions": 3,
            "submissions_stream": f"{name}.submissions",
            "backfill_stream": f"{name}.backfill",
        }
    )
    assert (await account(settings))[0] == ReconciliationReport()
    names = [f"n-{number}" for number in range(30)]
    await publish(settings, *(submission(settings, each) for each in names))
    await publish(settings, OutgoingMessage(settings.submissions_stream, b"not json", b"k"))
    intake = await bench.start()
    await bench.settled(31, within_s=90)
    await intake.drain()
    result, findings = await account(settings)
    assert (result, findings) == (
        ReconciliationReport(submissions=31, dead_letters=Counter(not_found=30, malformed=1)),
        [],
    )
    await publish(settings, dead_letter(settings, "n-3"), submission(settings, "lost"), verdict(settings, "stray"))
    _, findings = await account(settings)
    assert kinds(findings) == {("conflicting", "n-3"): 1, ("lost", "lost"): 1, ("unexplained", "stray"): 1}
