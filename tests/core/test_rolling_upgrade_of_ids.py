"""Ids and shares that processes compute for themselves are those of version 0.1.0.

Processes of both versions share a consumer group during a rolling upgrade. A message that a process of 0.1.0 judged may
be delivered again to one of today: its verdict must have the same id, the same policy version and the same key.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from services.core.messages import make_verdict_id
from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.rollout import Canary, Rollout, Shadow
from services.streams.base import Message
from services.streams.parsing import ParsedSubmission, parse

SHARES: Final = Rollout(active=1, canary=Canary(version=2, percent=10), shadow=Shadow(version=3, percent=10))
DOCUMENT: Final = PolicyDocument.model_validate(
    {
        "name": "shop",
        "description": "sells things",
        "categories": {"O9": "waive", "O1": {"should_not": ["Show ü."], "can": []}},
    }
)


@pytest.mark.parametrize(
    ("fields", "verdict_id"),
    [
        (
            {"submission_id": "upl-ü", "uri": "s3://uploads/ü.jpg", "object_version": "v1"},
            "a227be41-b011-53e7-8d81-0dd4c9a5fb52",
        ),
        (
            {
                "submission_id": "upl-1",
                "uri": "s3://uploads/1.jpg",
                "object_version": "e1",
                "calibration": "sha256:cc",
            },
            "b6c28021-127f-5df3-a5e2-10d5a18c73f5",
        ),
    ],
)
def test_verdict_id_is_that_of_0_1_0(fields: dict[str, Any], verdict_id: str) -> None:
    assert make_verdict_id(**fields, policy_digest="sha256:aa", model_revision="1f2e3d") == verdict_id


def test_canary_and_shadow_get_the_submissions_of_0_1_0() -> None:
    ids = [f"upl-{number}" for number in range(100)]
    canary = [number for number, each in enumerate(ids) if SHARES.choose_version("shop", each, "any tenant") == 2]
    shadow = [number for number, each in enumerate(ids) if SHARES.choose_shadow("shop", each) == 3]
    assert canary == [12, 20, 25, 29, 34, 38, 40, 52, 57, 64, 77, 80, 96, 99]
    assert shadow == [11, 23, 30, 32, 37, 52, 56, 86]


@pytest.mark.parametrize(
    ("document", "digest", "prompt"),
    [
        (
            BUILT_IN,
            "sha256:5824426d120c7627beab8a2384c669ac345c6ba8c9afcd9d33519eb571817e0a",
            "a594227e867fa71aaca72f38b2cdbfbfc96d782ceeed58b52031c09b3e57f379",
        ),
        (
            DOCUMENT,
            "sha256:1c86e40e048a515fc073f0e22f38582871001e8492bddbca298f5a85b7f420e3",
            "38511b510432ec91fb44c503dab9e8da2911ddfbafb85f97f2b812f7c2f5f6a9",
        ),
    ],
    ids=["built-in", "shop"],
)
def test_policy_has_the_digest_and_the_prompt_of_0_1_0(document: PolicyDocument, digest: str, prompt: str) -> None:
    assert document.digest() == digest
    assert hashlib.sha256(document.prompt().encode()).hexdigest() == prompt


def notification(key: str, **fields: str) -> dict[str, Any]:
    s3_object = {"key": key, "eTag": "e1", "sequencer": "0055AED6DCD90281", **fields}
    return {
        "Records": [
            {
                "eventName": "ObjectCreated:Put",
                "eventTime": "2026-01-21T10:00:00.000Z",
                "s3": {"bucket": {"name": "uploads"}, "object": s3_object},
            }
        ]
    }


@pytest.mark.parametrize(
    ("document", "submission_id", "key"),
    [
        (
            notification("events/%C3%A4+1.jpg"),
            "uploads/events/ä 1.jpg#0055AED6DCD90281",
            "s3://uploads/events/ä 1.jpg",
        ),
        (
            notification("x" * 300 + ".jpg", versionId="v1"),
            "sha256:8c2a16bb3f511cf05c9dbc1ad7bd633f3146377a75864143cc8d4188950e3b75",
            f"s3://uploads/{'x' * 300}.jpg",
        ),
        (
            {
                "specversion": "1.0",
                "type": "t",
                "source": "/u",
                "id": "e-1",
                "datacontenttype": "application/json",
                "data": {"id": "s-1", "uri": "s3://uploads/a.jpg"},
            },
            "s-1",
            "s3://uploads/a.jpg",
        ),
    ],
    ids=["S3 event", "S3 event with a long key", "CloudEvent"],
)
def test_message_has_the_submission_id_and_the_key_of_0_1_0(
    document: dict[str, Any], submission_id: str, key: str
) -> None:
    at = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
    (parsed,) = parse(Message(json.dumps(document).encode(), None, (), "sluice.submissions/1-0", at))
    assert isinstance(parsed, ParsedSubmission)
    assert (parsed.submission.id, parsed.key) == (submission_id, key.encode())
