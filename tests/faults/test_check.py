"""The check of the fault tests finds each kind of problem: each test damages a correct run."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.core.messages import DeadLetter, Timings, Verdict
from services.streams.base import Message
from tests.faults.check import Findings, check
from tests.faults.fleet import UNFORESEEN_FAILURES
from tests.faults.submissions import ExpectedOutcome, Pictures, Submitted, submissions
from tests.support.fake_guard import MODEL

_ROOT = Path(__file__).parents[2]
_NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Run:
    """A run in which every submission has the expected outcome."""

    def __init__(self, folder: Path) -> None:
        self.submitted = submissions(1, 400, Pictures(folder, 1))
        self.on_stream = [_message("submissions", n, each.value, each.key) for n, each in enumerate(self.submitted)]
        self.verdicts: list[Message] = []
        self.letters: list[Message] = []
        for each in self.submitted:
            for outcome in each.expected:
                if outcome.reason is None:
                    self.verdicts.append(_verdict(len(self.verdicts), outcome))
                else:
                    self.letters.append(_letter(len(self.letters), each, outcome))

    def check(self, *, exactly_once: bool = False) -> Findings:
        return check(self.submitted, self.on_stream, self.verdicts, self.letters, exactly_once=exactly_once)

    def verdict_of(self, *, key: bytes | None = None, may_be_superseded: bool = False) -> list[int]:
        """The positions of the verdicts of such submissions."""
        wanted = {
            outcome.submission_id
            for each in self.submitted
            for outcome in each.expected
            if (key is None or each.key == key) and outcome.may_be_superseded == may_be_superseded
        }
        return [n for n, message in enumerate(self.verdicts) if _read(message).submission_id in wanted]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "pictures")


@pytest.mark.parametrize("exactly_once", [False, True])
def test_check_correct_run_has_no_problems(run: Run, *, exactly_once: bool) -> None:
    found = run.check(exactly_once=exactly_once)
    assert found.problems == []
    assert (found.lost, found.duplicates, found.submissions) == (0, 0, 400)
    assert len(found.dead_letters) == 7


def test_check_submission_without_outcome_is_lost(run: Run) -> None:
    del run.verdicts[5]
    found = run.check()
    assert found.lost == 1
    assert len(found.problems) == 1


def test_check_outcome_without_submission_is_reported(run: Run) -> None:
    run.verdicts.append(_changed(run.verdicts[0], submission_id="never"))
    assert run.check().problems == ["never was never submitted"]


def test_check_equal_repeat_is_reported_only_with_exactly_once(run: Run) -> None:
    run.verdicts.append(run.verdicts[5])
    run.letters.append(run.letters[0])
    assert run.check().problems == []
    assert run.check().duplicates == 2
    assert len(run.check(exactly_once=True).problems) >= 2


def test_check_second_different_outcome_is_reported(run: Run) -> None:
    run.verdicts.append(_changed(run.verdicts[5], verdict_id="another"))
    assert "different outcomes" in run.check().sentences()[0]


def test_check_unexpected_dead_letter_is_reported(run: Run) -> None:
    (n, *_) = run.verdict_of(key=None)
    verdict = _read(run.verdicts.pop(n))
    run.letters.append(_letter(99, run.submitted[0], ExpectedOutcome(verdict.submission_id, "not_found")))
    assert "should have a verdict, and has not_found" in run.check().sentences()[-1]


def test_check_verdict_of_another_image_is_reported(run: Run) -> None:
    run.verdicts[5] = _changed(run.verdicts[5], sha256="0" * 64)
    assert "another image" in run.check().sentences()[0]


def test_check_superseded_is_accepted_only_for_overtaken_events(run: Run) -> None:
    overtaken = run.verdict_of(may_be_superseded=True)[0]
    run.verdicts.append(_changed(run.verdicts[overtaken], outcome="superseded", verdict_id="not judged"))
    assert run.check().problems == []
    newest = run.verdict_of()[0]
    run.verdicts[newest] = _changed(run.verdicts[newest], outcome="superseded")
    assert "should have a verdict, and has superseded" in run.check().sentences()[0]


def test_check_wrong_order_of_a_key_is_reported(run: Run) -> None:
    key = next(each.key for each in run.submitted if each.key and len(run.verdict_of(key=each.key)) > 2)
    assert key is not None
    first, second, *_ = run.verdict_of(key=key)
    again = run.verdicts[first]
    run.verdicts.insert(second + 1, again)  # redelivered: the first outcomes are still in order
    assert run.check().problems == []
    del run.verdicts[first]
    assert "has its outcome after that of a later submission with its key" in run.check().sentences()[0]


def _message(stream: str, n: int, value: bytes, key: bytes | None, *headers: tuple[str, bytes]) -> Message:
    return Message(value, key, headers, f"{stream}/0/{n}", _NOW)


def _verdict(n: int, outcome: ExpectedOutcome) -> Message:
    assert outcome.submission_id is not None
    verdict = Verdict(
        verdict_id=f"verdict of {outcome.submission_id}",
        submission_id=outcome.submission_id,
        uri="s3://uploads/0/a.jpg",
        version_id=None,
        etag=None,
        sha256=outcome.sha256,
        tenant="default",
        outcome="verdict",
        rating=outcome.rating,
        category=None,
        rationale=None,
        score=None,
        action=None,
        policy=None,
        model=MODEL,
        effort="full",
        image=None,
        timings_ms=Timings(),
        metadata={},
        submitted_at=_NOW,
        judged_at=_NOW,
    )
    return _message("verdicts", n, verdict.model_dump_json().encode(), None)


def _letter(n: int, sent: Submitted, outcome: ExpectedOutcome) -> Message:
    assert outcome.reason is not None
    letter = DeadLetter(
        submission_id=outcome.submission_id,
        reason=outcome.reason,
        detail="",
        attempts=1,
        source="s/0/0",
        failed_at=_NOW,
    )
    return _message("letters", n, sent.value, sent.key, *letter.headers())


def _read(message: Message) -> Verdict:
    return Verdict.model_validate_json(message.value)


def _changed(message: Message, **fields: Any) -> Message:
    return dataclasses.replace(message, value=_read(message).model_copy(update=fields).model_dump_json().encode())


@pytest.mark.parametrize("message", UNFORESEEN_FAILURES)
def test_message_of_an_unforeseen_failure_is_logged_by_the_code(message: str) -> None:
    sources = [path for folder in ("services", "pipelines") for path in (_ROOT / folder).rglob("*.py")]

    assert any(f'"{message}' in path.read_text(encoding="utf-8") for path in sources)
