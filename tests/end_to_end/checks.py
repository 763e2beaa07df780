"""Checks that every submitted case has the outcome that the README promises."""

import json
import uuid
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema

from tests.end_to_end.corpus import Case, bad_input, events, images
from tests.end_to_end.outside import Entry, Uploads

SCHEMA = json.loads((Path(__file__).parents[2] / "infra" / "schemas" / "verdict.schema.json").read_text())


def check(cases: list[Case], verdicts: list[Entry], letters: list[Entry]) -> None:
    """Every case has the one outcome that the README promises."""
    expected_letters = Counter(case.end for case in cases if case.end not in ("verdict", "nothing"))
    reasons = Counter(entry.headers["sluice-reason"].decode() for entry in letters)
    details = [(entry.value[:100], entry.headers["sluice-detail"]) for entry in letters]
    assert reasons == expected_letters, (
        f"{reasons - expected_letters} too many, {expected_letters - reasons} missing: {details}"
    )
    expected_verdicts = Counter(case.submission_id for case in cases if case.end == "verdict")
    judged = [json.loads(entry.value) for entry in verdicts]
    assert Counter(verdict["submission_id"] for verdict in judged) == expected_verdicts
    by_id = {case.submission_id: case for case in cases if case.end == "verdict"}
    for entry, verdict in zip(verdicts, judged, strict=True):
        check_verdict(by_id[verdict["submission_id"]], entry, verdict)
    drawn = [(by_id[verdict["submission_id"]].rating, verdict["rating"]) for verdict in judged]
    right = [wanted == given for wanted, given in drawn if wanted]
    assert sum(right) >= 0.95 * len(right), f"{sum(right)} of {len(right)} ratings are right"
    for entry in letters:
        check_dead_letter(cases, entry)


def check_verdict(case: Case, entry: Entry, verdict: dict[str, Any]) -> None:
    jsonschema.validate(verdict, SCHEMA)
    assert verdict["outcome"] == "verdict"
    assert entry.key == (case.key or verdict["uri"].encode())
    assert uuid.UUID(verdict["verdict_id"]).version == 5
    assert 0 <= verdict["score"] <= 1
    assert len(verdict["sha256"]) == 64
    assert (verdict["policy"]["name"], verdict["policy"]["version"]) == ("default", 1)
    assert verdict["model"]["engine"].startswith("sglang ")
    assert verdict["effort"] == "full"
    assert verdict["source"] == "guard"
    assert datetime.fromisoformat(verdict["judged_at"]) >= datetime.fromisoformat(verdict["submitted_at"])
    if verdict["rating"] == "Unsafe":
        assert verdict["category"].startswith("O")
        assert verdict["rationale"].strip()
        assert verdict["action"] in ("review", "block")
    else:
        assert verdict["rationale"] is None
        assert verdict["action"] == "allow"
    document = json.loads(case.value)
    if "metadata" in document:
        assert verdict["metadata"] == document["metadata"]
        kind = document["id"].partition("-")[0]
        assert verdict["image"]["format"] == kind


def check_dead_letter(cases: list[Case], entry: Entry) -> None:
    case = next(case for case in cases if case.value == entry.value)
    reason = entry.headers["sluice-reason"].decode()
    assert reason == case.end
    assert entry.key == case.key
    submission_id = entry.headers.get("sluice-submission-id")
    assert (submission_id.decode() if submission_id else None) == case.submission_id
    assert entry.headers["sluice-source"].partition(b".submissions/")[1]
    assert int(entry.headers["sluice-attempts"]) >= 1
    assert entry.headers["sluice-detail"]
    assert b"Traceback" not in entry.headers["sluice-detail"]
    assert datetime.fromisoformat(entry.headers["sluice-failed-at"].decode()).tzinfo


def all_cases(uploads: Uploads, count: int) -> list[Case]:
    cases = [*images(count, uploads.put), *events(uploads.put), *bad_input(uploads.put)]
    assert len({case.value for case in cases}) == len(cases)
    return [*cases[1::2], *cases[::2]]  # the good and the bad mixed
