"""Processes of version 0.1.0 and of today on the same policy bucket, as during a rolling upgrade.

`bucket-0.1.0.json` holds the objects that the classes of 0.1.0 wrote: policy versions, changes of rollouts,
calibrations and API keys. Today's code must read them, and the same calls must write the same objects.
"""

import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import boto3
import pytest

from services.core.calibration import IsotonicMap, PlattMap, StoredCalibration
from services.gateway.api_keys import ApiKeyRegistry
from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Canary, Shadow
from services.policies.tenants import TenantsDocument

RECORDED: Final = json.loads((Path(__file__).parent / "bucket-0.1.0.json").read_text())
OBJECTS: Final[dict[str, str]] = RECORDED["objects"]
REVOKED_ID, VALID_ID = sorted({name.split("/")[1] for name in OBJECTS if name.startswith("keys/")})
AT: Final = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
SHOP: Final[dict[str, Any]] = {
    "name": "shop",
    "description": "sells things",
    "categories": {"O9": "waive"},
    "thresholds": {"block": 0.9},
}
DOCUMENTS: Final = [
    PolicyDocument.model_validate(SHOP | fields)
    for fields in (
        {},
        {"effort": "adaptive", "rationale": "never"},
        {"block_rate": {"at_least": 0.0, "at_most": 0.5, "window_s": 600, "after": 1000}},
    )
]
FITTED: Final = StoredCalibration(
    version=1,
    revision="1f2e3d",
    map=IsotonicMap(scores=(0.1, 0.9), probabilities=(0.05, 0.8)),
    samples=100,
    unsafe=10,
    ece_before=0.2,
    ece_after=0.1,
)
PLATT: Final = FITTED.model_copy(update={"map": PlattMap(slope=1.5, intercept=-0.25)})


class Bucket:
    """A bucket of its own."""

    def __init__(self, endpoint: str) -> None:
        self.s3 = boto3.client("s3", endpoint_url=endpoint)
        self.name = f"policies-{uuid.uuid4().hex}"
        self.s3.create_bucket(Bucket=self.name)
        self.registry = PolicyRegistry(self.s3, self.name, clock=lambda: AT)
        self.keys = ApiKeyRegistry(self.s3, self.name)

    def restore(self) -> None:
        """Write the recorded objects."""
        for key, body in OBJECTS.items():
            self.s3.put_object(Bucket=self.name, Key=key, Body=body.encode())

    def dump(self) -> dict[str, str]:
        listing = self.s3.list_objects_v2(Bucket=self.name)["Contents"]
        bodies = {each["Key"]: self.s3.get_object(Bucket=self.name, Key=each["Key"])["Body"] for each in listing}
        return {key: body.read().decode() for key, body in bodies.items()}


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    return Bucket(s3_endpoint)


def change_policies(registry: PolicyRegistry) -> None:
    """The calls of the recording."""
    registry.publish_built_in()
    for document in DOCUMENTS:
        registry.publish(document)
    registry.activate("shop", 1, who="ann", why="first")
    registry.activate("shop", 2, who="ann", why="ünlike")
    registry.rollback("shop", who="bob")
    registry.set_canary("shop", Canary(version=3, percent=5, tenants=frozenset({"acme"})), who="ann")
    registry.set_shadow("shop", Shadow(version=2, percent=12.5), who="ann")
    newest = registry.find_newest_change("shop")
    assert newest is not None
    registry.trip("shop", 3, since_change=newest.rollout.since, who="sluice", why="block rate 0.8")
    registry.calibrate("shop", FITTED, who="ann")
    registry.calibrate("shop", PLATT, who="ann")
    registry.revert_calibration("shop", 1, "1f2e3d", who="ann")
    registry.publish(TenantsDocument(tenants={"acme": "shop"}))
    registry.activate("tenants", 1, who="ann")


def test_same_calls_write_the_policy_objects_of_0_1_0(bucket: Bucket) -> None:
    change_policies(bucket.registry)
    assert bucket.dump() == {key: body for key, body in OBJECTS.items() if key.startswith("policies/")}


def test_policies_of_0_1_0_are_read(bucket: Bucket) -> None:
    bucket.restore()
    registry = bucket.registry
    assert registry.list_names() == ["default", "shop", "tenants"]
    assert [registry.get("shop", version).document for version in registry.list_versions("shop")] == DOCUMENTS
    assert registry.get("default", 1).document == BUILT_IN
    history = registry.list_changes("shop")
    assert [(change.action, change.previous, change.version, change.who) for change in history] == [
        ("activate", None, 1, "ann"),
        ("activate", 1, 2, "ann"),
        ("rollback", 2, 1, "bob"),
        ("canary", None, 3, "ann"),
        ("shadow", None, 2, "ann"),
        ("trip", 3, 3, "sluice"),
        ("calibrate", 1, 1, "ann"),
        ("calibrate", 1, 1, "ann"),
        ("calibrate", 1, 1, "ann"),
    ]
    state = history[-1].rollout
    assert (state.active, state.canary, state.tripped) == (1, None, {3})
    assert state.shadow == Shadow(version=2, percent=12.5)
    assert state.get_calibrations(1) == {"1f2e3d": FITTED.map}
    for fitted in (FITTED, PLATT):
        assert registry.find_calibration("shop", 1, "1f2e3d", fitted.map.digest) == fitted
    tenants = registry.get("tenants", 1).document
    assert isinstance(tenants, TenantsDocument)
    assert tenants.tenants == {"acme": "shop"}


def test_change_after_those_of_0_1_0_continues_their_numbers(bucket: Bucket) -> None:
    bucket.restore()
    assert bucket.registry.publish(DOCUMENTS[0]).version == 4
    assert bucket.registry.activate("shop", 4, who="ann").number == 10


def test_api_keys_of_0_1_0_are_read(bucket: Bucket) -> None:
    bucket.restore()
    assert bucket.keys.read_index() == {REVOKED_ID: True, VALID_ID: False}
    revoked, valid = bucket.keys.get_each([REVOKED_ID, VALID_ID])
    assert (revoked.name, revoked.role, revoked.tenant, revoked.rate_per_s, revoked.concurrency) == (
        *("ci", "moderate", "shop", 5, 2),
    )
    assert (valid.name, valid.role, valid.tenant, valid.rate_per_s, valid.concurrency, valid.created_by) == (
        *("ada", "admin", "default", None, None, "ann"),
    )
    assert revoked.digest == hashlib.sha256(RECORDED["token"].encode()).hexdigest()


def test_same_calls_write_the_api_keys_of_0_1_0(bucket: Bucket) -> None:
    key, token = bucket.keys.create("ci", "moderate", tenant="shop", rate_per_s=5, concurrency=2, who="ann")
    other, _ = bucket.keys.create("ada", "admin", who="ann")
    bucket.keys.revoke(key.id, who="bob")
    assert re.fullmatch(r"sk-sluice-[0-9a-f]{16}-[A-Za-z0-9_-]{43}", token)
    assert re.fullmatch(r"sk-sluice-[0-9a-f]{16}-[A-Za-z0-9_-]{43}", RECORDED["token"])
    recorded = {REVOKED_ID: "first", VALID_ID: "second"}
    assert without_random_parts(bucket.dump(), {key.id: "first", other.id: "second"}) == without_random_parts(
        {name: body for name, body in OBJECTS.items() if name.startswith("keys/")}, recorded
    )


def without_random_parts(objects: dict[str, str], ids: dict[str, str]) -> dict[str, str]:
    """The objects with a word in the place of each id, digest and time."""
    text = json.dumps(objects, sort_keys=True)
    for key_id, word in ids.items():
        text = text.replace(key_id, word)
    text = re.sub("[0-9a-f]{64}", "a digest", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "a time", text)
    found: dict[str, str] = json.loads(text)
    return found
