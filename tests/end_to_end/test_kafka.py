"""`sluice up` on Kafka, before the tests of this folder that share a service: its two services run alone."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.checks import all_cases, check
from tests.end_to_end.corpus import IMAGE_LIMIT_BYTES
from tests.end_to_end.outside import (
    STOP_S,
    Entry,
    KafkaStream,
    Service,
    Uploads,
    new_folder,
    submit,
    wait_until_settled,
)
from tests.support.s3_server import CREDENTIALS

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(900)]

KAFKA_IMAGES = 104
"""Eight of each format."""


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """The services that a test starts and puts here are killed after the test."""
    started: list[Service] = []
    yield started
    for service in started:
        service.kill()


@pytest.mark.kafka
def test_kafka_service_after_sigterm_under_load_leaves_the_rest_to_the_next(
    tmp_path: Path, services: list[Service], kafka_address: str, s3_endpoint: str
) -> None:
    """Kafka is chosen by settings alone. A first service gets SIGTERM under load; a second one finishes the rest."""
    prefix = f"e2e-{uuid.uuid4().hex[:8]}"
    stream = KafkaStream(kafka_address, prefix)
    uploads = Uploads(s3_endpoint, CREDENTIALS)
    uploads.create("uploads", "policies")
    environment = {
        **CREDENTIALS,
        "SLUICE_IMAGE_LIMIT_BYTES": str(IMAGE_LIMIT_BYTES),
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
    cases = all_cases(uploads, KAFKA_IMAGES)
    count = sum(case.end != "nothing" for case in cases)

    first = Service(new_folder(tmp_path), "--embedded", environment=environment)
    services.append(first)
    written = first.wait_until_ready()
    assert "AWS_SECRET_ACCESS_KEY" not in written, "only embedded credentials are written down"
    assert "SLUICE_GATEWAY_URL" in written
    assert "SLUICE_API_KEY" not in written, "an API key is created only in an embedded bucket"
    submit(stream, cases)
    first.terminate(3 + STOP_S)
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
