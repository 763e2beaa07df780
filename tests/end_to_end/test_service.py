"""`sluice up` from outside: every kind of input, on both streams, judged by the real engine."""

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.end_to_end.corpus import IMAGE_LIMIT_BYTES, Case, bad_input, events, images
from tests.end_to_end.gateway import check_gateway
from tests.end_to_end.outside import (
    Entry,
    KafkaStream,
    RedisStream,
    Service,
    Uploads,
    new_folder,
    submit,
    wait_until_settled,
)
from tests.support.s3_server import CREDENTIALS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCHEMA = json.loads((Path(__file__).parents[2] / "infra" / "schemas" / "verdict.schema.json").read_text())
LIMITS = {"SLUICE_IMAGE_LIMIT_BYTES": str(IMAGE_LIMIT_BYTES), "SLUICE_DRAIN_S": "20"}
ENDS_WITHIN_S = 20 + 15


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """Whatever a test starts and puts here ends with the test."""
    started: list[Service] = []
    yield started
    for service in started:
        service.kill()


def check(cases: list[Case], verdicts: list[Entry], letters: list[Entry]) -> None:
    """Every case ended once, as it must."""
    expected_letters = Counter(case.end for case in cases if case.end not in ("verdict", "nothing"))
    assert Counter(entry.headers["sluice-reason"].decode() for entry in letters) == expected_letters
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


def test_embedded(tmp_path: Path, services: list[Service]) -> None:
    """With nothing but `sluice up --embedded`: each of 200 images and every row of bad input ends once, as promised."""
    service = Service(tmp_path, "--embedded", environment=LIMITS)
    services.append(service)
    settings = service.wait_until_ready()
    stream = RedisStream(settings["SLUICE_STREAM_URL"])
    uploads = Uploads(settings["SLUICE_S3_ENDPOINT"], settings)
    cases = all_cases(uploads, 200)
    submit(stream, cases)
    verdicts, letters = wait_until_settled(stream, sum(case.end != "nothing" for case in cases), within_s=240)
    check(cases, verdicts, letters)
    check_gateway(settings, SCHEMA)
    service.interrupt(ENDS_WITHIN_S)
    assert "Traceback" not in service.log.read_text()


@pytest.mark.kafka
def test_kafka_and_a_sigterm_under_load(
    tmp_path: Path, services: list[Service], kafka_address: str, s3_endpoint: str
) -> None:
    """On Kafka by settings alone. A first service is told to end under load, a second one finishes the rest."""
    prefix = f"e2e-{uuid.uuid4().hex[:8]}"
    stream = KafkaStream(kafka_address, prefix)
    uploads = Uploads(s3_endpoint, CREDENTIALS)
    uploads.create("uploads", "policies")
    environment = {
        **CREDENTIALS,
        **LIMITS,
        "SLUICE_STREAM_URL": f"kafka://{kafka_address}",
        "SLUICE_S3_ENDPOINT": s3_endpoint,
        "SLUICE_S3_BUCKETS": "uploads",
        "SLUICE_POLICY_BUCKET": "policies",
        "SLUICE_MODEL": "tiny",
        "SLUICE_DRAIN_S": "3",
        "SLUICE_GROUP": prefix,
        "SLUICE_SUBMISSIONS_STREAM": f"{prefix}.submissions",
        "SLUICE_VERDICTS_STREAM": f"{prefix}.verdicts",
        "SLUICE_DEAD_LETTERS_STREAM": f"{prefix}.dead-letters",
    }
    cases = all_cases(uploads, 200)
    count = sum(case.end != "nothing" for case in cases)

    first = Service(new_folder(tmp_path), "--embedded", environment=environment)
    services.append(first)
    assert "AWS_SECRET_ACCESS_KEY" not in first.wait_until_ready(), "only embedded credentials are written down"
    submit(stream, cases)
    first.terminate(3 + 15)
    settled = len(stream.read("verdicts")) + len(stream.read("dead-letters"))
    assert 0 < settled < count, "the signal did not come under load"

    second = Service(new_folder(tmp_path), "--embedded", environment=environment)
    services.append(second)
    second.wait_until_ready()
    verdicts, letters = wait_until_settled(stream, count, within_s=240)
    second.kill_alone(60)
    # At least once: what was published and not yet committed may come again, with the same id.
    by_id: dict[str, set[str]] = {}
    once: dict[str, Entry] = {}
    for entry in verdicts:
        verdict = json.loads(entry.value)
        by_id.setdefault(verdict["submission_id"], set()).add(verdict["verdict_id"])
        once[verdict["submission_id"]] = entry
    assert all(len(ids) == 1 for ids in by_id.values())
    check(cases, list(once.values()), list({entry.value: entry for entry in letters}.values()))
