"""S3 events of one object: an event that was overtaken is superseded, and a made-up event cannot make a real one so."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.tiny_guard.drawings import draw
from services.core.messages import DeadLetter, Verdict
from services.core.values import CATEGORIES
from tests.support.intake_bench import IntakeBench

HARMLESS, FIGHT = draw(1).jpeg, draw(2, CATEGORIES[1]).jpeg
FORGED = "0" * 32
KEY = "victim.jpg"


def created(sequencer: str, etag: str | None) -> dict[str, Any]:
    stored = {"key": KEY, "sequencer": sequencer} | ({"eTag": etag} if etag else {})
    return {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "uploads"}, "object": stored}}


def outcomes(verdicts: list[Verdict], letters: list[DeadLetter]) -> dict[str, str]:
    """The outcome or the reason of each event, by its sequencer."""
    found = {str(letter.submission_id): letter.reason for letter in letters}
    found |= {verdict.submission_id: verdict.outcome for verdict in verdicts}
    return {submission_id.partition("#")[2]: outcome for submission_id, outcome in found.items()}


@pytest.mark.parametrize("is_started", [True, False])
@pytest.mark.parametrize("is_forged_first", [True, False])
@pytest.mark.parametrize("in_one_message", [True, False])
async def test_made_up_event_does_not_supersede_the_real_one(
    bench: IntakeBench, is_started: bool, is_forged_first: bool, in_one_message: bool
) -> None:
    etag = bench.put(KEY, FIGHT)
    forged = [created(f"FFFFFFFF{number:02d}", FORGED) for number in range(10)]
    records = [*forged, created("0A", etag)] if is_forged_first else [created("0A", etag), *forged]
    if is_started:
        await bench.start()
    for some in [records] if in_one_message else [[record] for record in records]:
        await bench.submit({"Records": some})
    if not is_started:
        await bench.start()
    verdicts, letters = await bench.settled(11)
    assert outcomes(verdicts, letters) == {"0A": "verdict"} | {f"FFFFFFFF{n:02d}": "changed" for n in range(10)}
    assert verdicts[0].sha256 == hashlib.sha256(FIGHT).hexdigest()


async def test_made_up_event_judged_before_the_upload_does_not_supersede_it(bench: IntakeBench) -> None:
    bench.put(KEY, HARMLESS)
    await bench.start()
    await bench.submit({"Records": [created("FFFFFFFF", None)]})
    await bench.settled(1)
    etag = bench.put(KEY, FIGHT)
    await bench.submit({"Records": [created("0A", etag)]})
    verdicts, letters = await bench.settled(2)
    assert outcomes(verdicts, letters) == {"FFFFFFFF": "verdict", "0A": "verdict"}
    assert verdicts[-1].sha256 == hashlib.sha256(FIGHT).hexdigest()


@pytest.fixture
def versioned(bench: IntakeBench) -> Iterator[IntakeBench]:
    """The bucket keeps the old versions of its objects."""
    bench.s3.put_bucket_versioning(Bucket="uploads", VersioningConfiguration={"Status": "Enabled"})
    yield bench
    for found in bench.s3.list_object_versions(Bucket="uploads").get("Versions", ()):
        bench.s3.delete_object(Bucket="uploads", Key=found["Key"], VersionId=found["VersionId"])
    bench.s3.delete_bucket(Bucket="uploads")  # versioning can be suspended only
    bench.s3.create_bucket(Bucket="uploads")


def put_version(bench: IntakeBench, data: bytes) -> str:
    return str(bench.s3.put_object(Bucket="uploads", Key=KEY, Body=data)["VersionId"])


def version_created(sequencer: str, version_id: str) -> dict[str, Any]:
    record = created(sequencer, None)
    record["s3"]["object"]["versionId"] = version_id
    return record


@pytest.mark.parametrize("is_judged_before", [True, False])
async def test_event_of_an_old_version_does_not_supersede_the_present_one(
    versioned: IntakeBench, is_judged_before: bool
) -> None:
    """The attacker names a harmless version that exists, with a high sequencer."""
    old = put_version(versioned, HARMLESS)
    await versioned.start()
    await versioned.submit({"Records": [version_created("FFFFFFFF", old)]})
    if is_judged_before:
        await versioned.settled(1)
    new = put_version(versioned, FIGHT)
    await versioned.submit({"Records": [version_created("0A", new)]})
    verdicts, letters = await versioned.settled(2)
    assert outcomes(verdicts, letters) == {old: "verdict", new: "verdict"}
    assert {verdict.sha256 for verdict in verdicts} == {hashlib.sha256(data).hexdigest() for data in (HARMLESS, FIGHT)}


async def test_replaced_version_is_superseded(versioned: IntakeBench) -> None:
    versions = [put_version(versioned, data) for data in (HARMLESS, HARMLESS, FIGHT)]
    for sequencer, version in zip(("0A", "0B", "0C"), versions, strict=True):
        await versioned.submit({"Records": [version_created(sequencer, version)]})
    await versioned.start()
    assert outcomes(*await versioned.settled(3)) == dict(
        zip(versions, ["superseded", "superseded", "verdict"], strict=True)
    )


async def test_overwritten_object_has_one_verdict_and_no_dead_letter(bench: IntakeBench) -> None:
    old, new = bench.put(KEY, HARMLESS), bench.put(KEY, FIGHT)
    for sequencer, etag in (("0A", old), ("0B", old), ("0C", new)):
        await bench.submit({"Records": [created(sequencer, etag)]})
    await bench.start()
    assert outcomes(*await bench.settled(3)) == {"0A": "superseded", "0B": "superseded", "0C": "verdict"}


@pytest.mark.parametrize("is_same_content", [True, False])
async def test_event_that_arrives_late_is_superseded(bench: IntakeBench, is_same_content: bool) -> None:
    old, new = bench.put(KEY, HARMLESS), bench.put(KEY, FIGHT)
    await bench.start()
    await bench.submit({"Records": [created("0B", new)]})
    await bench.settled(1)
    await bench.submit({"Records": [created("0A", new if is_same_content else old)]})
    assert outcomes(*await bench.settled(2)) == {"0A": "superseded", "0B": "verdict"}
