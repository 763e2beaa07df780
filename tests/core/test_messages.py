"""Messages: valid and malformed submissions, verdict ids, headers of dead letters, and the schemas."""

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import Malformed
from services.core.json_schemas import MESSAGES, build_schema
from services.core.messages import METADATA_LIMIT_BYTES, DeadLetter, Submission, decode_json, make_verdict_id

MINIMAL = {"id": "upl-42", "uri": "s3://uploads/2026/cat.jpg"}


def test_submission_optional_fields_missing_gets_defaults() -> None:
    submission = Submission.parse(MINIMAL | {"unknown": "ignored", "policy": None, "metadata": None})
    assert (submission.tenant, submission.policy, submission.priority, submission.metadata) == (
        "default",
        "default",
        "live",
        {},
    )
    assert (submission.reference.bucket, submission.reference.key) == ("uploads", "2026/cat.jpg")


@pytest.mark.parametrize(
    ("change", "field", "readable"),
    [
        ({"id": None}, "id", None),
        ({"id": 7}, "id", None),
        ({"id": ""}, "id", None),
        ({"id": "x" * 257}, "id", None),
        ({"uri": None}, "uri", "upl-42"),
        ({"uri": "https://uploads/cat.jpg"}, "uri", "upl-42"),
        ({"uri": "s3://uploads"}, "uri", "upl-42"),
        ({"uri": "s3:///cat.jpg"}, "uri", "upl-42"),
        ({"priority": "urgent"}, "priority", "upl-42"),
        ({"submitted_at": "yesterday"}, "submitted_at", "upl-42"),
        ({"metadata": {"blob": "x" * METADATA_LIMIT_BYTES}}, "metadata", "upl-42"),
    ],
)
def test_submission_malformed_error_has_field_and_id(change: dict[str, Any], field: str, readable: str | None) -> None:
    with pytest.raises(Malformed, match=f"^{field}: ") as caught:
        Submission.parse(MINIMAL | change)
    assert caught.value.submission_id == readable


@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"{", b'{"score": NaN}', b'"\\ud800"', b"[" * 100_000])
def test_decode_json_invalid_text_raises_malformed(value: bytes) -> None:
    with pytest.raises(Malformed):
        decode_json(value)


def test_submitted_at_other_or_no_time_zone_becomes_utc() -> None:
    submission = Submission.parse(MINIMAL | {"submitted_at": "2026-11-21T12:00:00+02:00"})
    assert submission.submitted_at == datetime(2026, 11, 21, 10, tzinfo=UTC)
    naive = Submission.parse(MINIMAL | {"submitted_at": "2026-11-21T10:00:00"})
    assert naive.submitted_at == submission.submitted_at


@given(st.lists(st.text(), min_size=5, max_size=5), st.integers(0, 4), st.text())
def test_verdict_id_changes_with_each_part(parts: list[str], changed: int, other: str) -> None:
    names = ("submission_id", "uri", "object_version", "policy_digest", "model_revision")
    arguments = dict(zip(names, parts, strict=True))
    one = make_verdict_id(**arguments)
    assert uuid.UUID(one).version == 5
    assert (make_verdict_id(**arguments | {names[changed]: other}) == one) == (other == parts[changed])


def test_dead_letter_headers_are_read_back() -> None:
    letter = DeadLetter(
        submission_id="bild-ä",
        reason="changed",
        detail="s3://b/ä no longer has that ETag",
        attempts=2,
        source="sluice.submissions/0/17",
        failed_at=datetime(2026, 11, 21, tzinfo=UTC),
    )
    assert [name for name, _ in letter.headers()] == [
        f"sluice-{name}" for name in ("submission-id", "reason", "detail", "attempts", "source", "failed-at")
    ]
    assert DeadLetter.from_headers((*letter.headers(), ("traceparent", b"00-x"))) == letter


def test_dead_letter_without_id_has_no_id_header() -> None:
    letter = DeadLetter(
        reason="malformed", detail="x", attempts=1, source="s/1-0", failed_at=datetime(2026, 11, 21, tzinfo=UTC)
    )
    assert "sluice-submission-id" not in dict(letter.headers())


@pytest.mark.parametrize("message", MESSAGES)
def test_schemas_exported_files_are_current(message: str) -> None:
    file = Path(__file__).parents[2] / "infra" / "schemas" / f"{message}.schema.json"
    assert json.loads(file.read_text()) == build_schema(message), "run `make schemas`"
