"""Separated tenants under attack from the stream: a submission gets neither objects nor policies of other tenants."""

from typing import Any

from services.core.messages import DeadLetter, Verdict
from services.policies.document import PolicyDocument
from services.policies.tenants import TenantsDocument
from tests.support.intake_bench import IntakeBench

PREFIXES = ("a=s3://uploads/a/", "b=s3://uploads/b/")


def native(name: str, key: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "uri": f"s3://uploads/{key}"} | fields


def event(*keys: str) -> dict[str, Any]:
    """An S3 notification of the creation of these objects."""
    records = [
        {
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "uploads"}, "object": {"key": key, "sequencer": "1"}},
        }
        for key in keys
    ]
    return {"Records": records}


def by_id(verdicts: list[Verdict], letters: list[DeadLetter]) -> dict[str | None, str]:
    """The outcome and tenant of each verdict, and the reason of each dead letter."""
    outcomes: dict[str | None, str] = {each.submission_id: f"{each.outcome} {each.tenant}" for each in verdicts}
    return outcomes | {each.submission_id: each.reason for each in letters}


async def test_objects_of_other_tenants_are_forbidden_and_events_get_the_tenant_of_their_object(
    bench: IntakeBench,
) -> None:
    for key in ("a/cat.jpg", "b/cat.jpg", "b/event.jpg", "cat.jpg", "a2/cat.jpg"):
        bench.put(key)
    await bench.start(tenant_prefixes=PREFIXES)
    await bench.submit(native("own", "a/cat.jpg", tenant="a"))
    await bench.submit(native("foreign", "b/cat.jpg", tenant="a"))
    await bench.submit(native("foreign-absent", "b/absent.jpg", tenant="a"))
    await bench.submit(native("own-absent", "a/absent.jpg", tenant="a"))
    await bench.submit(native("nobody", "a/cat.jpg"))
    await bench.submit(native("sibling", "a2/cat.jpg", tenant="a"))
    await bench.submit(native("up", "a/../b/cat.jpg", tenant="a"))
    await bench.submit(native("unknown", "a/cat.jpg", tenant="c"))
    cloud = {"specversion": "1.0", "type": "t", "source": "s", "id": "1"}
    await bench.submit(cloud | {"data": native("wrapped", "b/cat.jpg", tenant="a")})
    await bench.submit(event("b/event.jpg", "cat.jpg", "b/absent-event.jpg"))
    verdicts, letters = await bench.settled(12)
    assert by_id(verdicts, letters) == {
        "own": "verdict a",
        "foreign": "forbidden",
        "foreign-absent": "forbidden",
        "own-absent": "not_found",
        "nobody": "forbidden",
        "sibling": "forbidden",
        "up": "forbidden",
        "unknown": "forbidden",
        "wrapped": "forbidden",
        "uploads/b/event.jpg#1": "verdict b",
        "uploads/cat.jpg#1": "forbidden",
        "uploads/b/absent-event.jpg#1": "not_found",
    }
    (detail,) = [letter.detail for letter in letters if letter.submission_id == "foreign"]
    assert "the tenant 'a' may not use s3://uploads/b/cat.jpg" in detail
    assert "SLUICE_TENANT_PREFIXES" in detail


async def test_policies_of_other_tenants_are_unknown(bench: IntakeBench) -> None:
    for name in ("strict", "secret", "own-of-b"):
        bench.registry.publish(PolicyDocument.model_validate({"name": name}))
        bench.registry.activate(name, 1, who="test")
    bench.registry.publish(TenantsDocument(tenants={"b": "own-of-b"}))
    bench.registry.activate("tenants", 1, who="test")
    bench.put("a/cat.jpg")
    bench.put("b/cat.jpg")
    await bench.start(tenant_prefixes=PREFIXES, tenant_policies=("a=strict",))
    cases = {
        "a": ("default", "default@1", "strict", "strict@1", "secret", "secret@1", "own-of-b", "absent", "strict@9"),
        "b": ("default", "own-of-b@1", "strict", "default@1", "tenants", "tenants@1"),
    }
    for tenant, policies in cases.items():
        for policy in policies:
            await bench.submit(native(f"{tenant} {policy}", f"{tenant}/cat.jpg", tenant=tenant, policy=policy))
    verdicts, letters = await bench.settled(15)
    judged = {verdict.submission_id: verdict.policy.name for verdict in verdicts if verdict.policy}
    assert judged == {
        "a default": "default",
        "a default@1": "default",
        "a strict": "strict",
        "a strict@1": "strict",
        "b default": "own-of-b",
        "b own-of-b@1": "own-of-b",
    }
    assert {letter.reason for letter in letters} == {"unknown_policy"}
    details = {letter.submission_id: letter.detail for letter in letters}
    assert details["a secret@1"].replace("secret@1", "strict@9") == details["a strict@9"], "it may not say what exists"


async def test_tenants_without_prefixes_may_use_every_object_and_policy(bench: IntakeBench) -> None:
    bench.registry.publish(PolicyDocument.model_validate({"name": "strict"}))
    bench.registry.activate("strict", 1, who="test")
    bench.put("b/cat.jpg")
    await bench.start()
    await bench.submit(native("named", "b/cat.jpg", tenant="a", policy="strict"))
    await bench.submit(event("b/cat.jpg"))
    assert by_id(*await bench.settled(2)) == {"named": "verdict a", "uploads/b/cat.jpg#1": "verdict default"}
