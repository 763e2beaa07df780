"""API keys under attack from their owners: a key neither gets nor finds objects and policies beyond its scope."""

from typing import Any

import httpx
import pytest

from services.core.values import Assessment, Detail, PreparedImage
from services.gateway.problems import TYPE_PREFIX
from services.images import object_store
from services.policies.document import PolicyDocument
from services.policies.tenants import TenantsDocument
from tests.support.gateway_bench import JPEG, GatewayBench, data_url, unsafe

PREFIXES = ("a=s3://uploads/tenant-a/", "b=s3://uploads/tenant-b/", "c=s3://uploads/tenant-c/")
POLICIES = ("a=strict", "a=joint", "c=joint")
ASSESSMENTS = "/v1/assessments?wait=20"


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return unsafe()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects for which a request was sent to S3."""
    uris: list[str] = []
    begin = object_store._Download.begin

    def record(download: Any) -> int:
        uris.append(download._reference.uri)
        return begin(download)

    monkeypatch.setattr(object_store._Download, "begin", record)
    return uris


def publish(bench: GatewayBench, *names: str) -> None:
    for name in names:
        bench.registry.publish(PolicyDocument.model_validate({"name": name, "categories": {"O6": "waive"}}))
        bench.registry.activate(name, 1, who="test")


@pytest.fixture
async def separated(idle: GatewayBench) -> GatewayBench:
    """A started gateway with the tenants a, b and c, and an unsafe image of each."""
    idle.configure(tenant_prefixes=PREFIXES, tenant_policies=POLICIES)
    idle.guard.script = says_unsafe
    publish(idle, "strict", "of-a", "of-b", "joint")
    idle.registry.publish(TenantsDocument(tenants={"a": "of-a", "b": "of-b"}))
    idle.registry.activate("tenants", 1, who="test")
    for tenant in ("a", "b", "c"):
        idle.put(f"tenant-{tenant}/cat.jpg")
    await idle.start()
    return idle


def client_of(bench: GatewayBench, **fields: Any) -> httpx.AsyncClient:
    _, token = bench.keys.create("limited", fields.pop("role", "moderate"), **fields)
    return bench.client(Authorization=f"Bearer {token}")


def seen(answer: httpx.Response, *names: str) -> tuple[int, str, dict[str, str]]:
    """All that a client sees of an answer, apart from the names that it sent itself and from random ids."""
    text = answer.text
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "NAME")
    return answer.status_code, text, dict(answer.headers) | {"location": "", "content-length": str(len(text))}


async def test_foreign_objects_look_absent_and_no_request_is_sent_to_s3(
    separated: GatewayBench, fetched: list[str]
) -> None:
    etag = separated.s3.head_object(Bucket="uploads", Key="tenant-b/cat.jpg")["ETag"]
    foreign = [
        {"uri": "s3://uploads/tenant-b/cat.jpg"},
        {"uri": "s3://uploads/tenant-b/cat.jpg", "etag": etag},
        {"uri": "s3://uploads/tenant-b/cat.jpg", "etag": "0" * 32},
        {"uri": "s3://uploads/tenant-b/cat.jpg", "version_id": "null"},
        {"uri": "s3://uploads/tenant-b/cat.jpg", "detail": "score"},
        {"uri": "s3://uploads/tenant-b/absent.jpg"},
        {"uri": "s3://uploads/tenant-a2/cat.jpg"},
        {"uri": "s3://uploads/tenant-b/../tenant-a/cat.jpg"},
        {"uri": f"s3://{separated.settings.policy_bucket}/keys/"},
        {"uri": "s3://no-such-bucket/cat.jpg"},
    ]
    async with separated.client(tenant="a") as client:
        own = await client.post(ASSESSMENTS, json={"uri": "s3://uploads/tenant-a/cat.jpg"})
        assert (own.status_code, own.json()["action"]) == (200, "block")
        absent = await client.post(ASSESSMENTS, json={"uri": "s3://uploads/tenant-a/absent.jpg"})
        assert (absent.status_code, absent.json()["type"]) == (422, f"{TYPE_PREFIX}image-not-found")
        assert fetched == ["s3://uploads/tenant-a/cat.jpg", "s3://uploads/tenant-a/absent.jpg"]
        for body in foreign:
            assert seen(await client.post(ASSESSMENTS, json=body)) == seen(absent), body

        later = [
            await client.post("/v1/assessments", json={"uri": f"s3://uploads/tenant-{name}.jpg"})
            for name in ("b/cat", "a/absent")
        ]
        assert [answer.status_code for answer in later] == [202, 202], "the outcome is only in the assessment"
        hidden, missing = [await client.get(f"{answer.headers['location']}?wait=20") for answer in later]
        assert seen(hidden) == seen(missing) == seen(absent)

        as_openai = [
            await client.post("/v1/moderations", json={"input": [image(data_url()), image(f"s3://uploads/{key}.jpg")]})
            for key in ("tenant-b/cat", "tenant-a/absent")
        ]
        assert [answer.status_code for answer in as_openai] == [400, 400]
        assert seen(as_openai[0]) == seen(as_openai[1])
    assert {uri for uri in fetched if not uri.startswith("s3://uploads/tenant-a/")} == set()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


async def test_foreign_policies_look_absent(separated: GatewayBench) -> None:
    async with separated.client(tenant="a") as client:

        async def ask(policy: str) -> httpx.Response:
            return await client.post(ASSESSMENTS, json={"uri": data_url(), "policy": policy})

        used = {policy: await ask(policy) for policy in ("default", "of-a", "of-a@1", "strict", "strict@1", "joint")}
        assert {name: answer.json()["policy"]["name"] for name, answer in used.items()} == {
            "default": "of-a",
            "of-a": "of-a",
            "of-a@1": "of-a",
            "strict": "strict",
            "strict@1": "strict",
            "joint": "joint",
        }
        absent = await ask("strict@9")
        assert (absent.status_code, absent.json()["type"]) == (422, f"{TYPE_PREFIX}unknown-policy")
        for policy in ("of-b", "of-b@1", "of-b@9", "default@1", "default@9", "no-such", "no-such@1"):
            assert seen(await ask(policy), policy) == seen(absent, "strict@9"), policy
        moderated = [
            await client.post("/v1/moderations", json={"input": image(data_url()), "policy": policy})
            for policy in ("of-b", "no-such", "strict@9")
        ]
        assert len({seen(*each)[:2] for each in zip(moderated, ("of-b", "no-such", "strict@9"), strict=True)}) == 1


async def test_a_tenant_without_prefixes_can_judge_uploads_only(separated: GatewayBench) -> None:
    async with separated.client() as client:
        upload = await client.post(ASSESSMENTS, files={"file": JPEG})
        assert (upload.status_code, upload.json()["policy"]["name"]) == (200, "default")
        for tenant in ("a", "b"):
            answer = await client.post(ASSESSMENTS, json={"uri": f"s3://uploads/tenant-{tenant}/cat.jpg"})
            assert answer.json()["type"] == f"{TYPE_PREFIX}image-not-found"


async def test_a_key_of_all_tenants_may_use_everything_but_sees_no_foreign_assessments(
    separated: GatewayBench,
) -> None:
    async with client_of(separated, all_tenants=True) as client, separated.client(tenant="b") as other:
        for tenant in ("a", "b"):
            body = {"uri": f"s3://uploads/tenant-{tenant}/cat.jpg", "policy": f"of-{tenant}"}
            assert (await client.post(ASSESSMENTS, json=body)).status_code == 200
        foreign = await other.post(ASSESSMENTS, json={"uri": "s3://uploads/tenant-b/cat.jpg"})
        assert (await client.get(foreign.headers["location"])).status_code == 404


@pytest.mark.parametrize("is_separated", [False, True])
async def test_a_key_narrows_what_its_tenant_may_use_and_never_widens_it(
    idle: GatewayBench, is_separated: bool, fetched: list[str]
) -> None:
    if is_separated:
        idle.configure(tenant_prefixes=PREFIXES, tenant_policies=("a=strict", "a=other"))
    publish(idle, "strict", "other", "of-b")
    uris = [idle.put(key) for key in ("tenant-a/public/cat.jpg", "tenant-a/private/cat.jpg", "tenant-b/cat.jpg")]
    await idle.start()
    prefixes, policies = ["s3://uploads/tenant-a/public/"], ["strict"]
    if is_separated:  # the operator grants more than the tenant has
        prefixes, policies = [*prefixes, "s3://uploads/tenant-b/"], [*policies, "of-b"]
    async with client_of(idle, tenant="a", prefixes=prefixes, policies=policies) as client:
        answers = [await client.post(ASSESSMENTS, json={"uri": uri, "policy": "strict"}) for uri in uris]
        assert [answer.status_code for answer in answers] == [200, 422, 422]
        assert fetched == uris[:1]
        for policy in ("default", "other", "of-b", "of-b@1"):
            answer = await client.post(ASSESSMENTS, json={"uri": uris[0], "policy": policy})
            assert answer.json()["type"] == f"{TYPE_PREFIX}unknown-policy", policy


async def test_keys_may_use_everything_if_tenants_are_not_separated(bench: GatewayBench) -> None:
    publish(bench, "of-b")
    uri = bench.put("tenant-b/cat.jpg")
    async with bench.client(tenant="a") as client:
        assert (await client.post(ASSESSMENTS, json={"uri": uri, "policy": "of-b"})).status_code == 200
        outside = await client.post(ASSESSMENTS, json={"uri": "s3://no-such-bucket/cat.jpg"})
        assert (outside.status_code, outside.json()["type"]) == (403, f"{TYPE_PREFIX}image-forbidden")


@pytest.mark.parametrize("role", ["review", "admin"])
async def test_reviewers_and_admins_read_only_policies_of_their_tenant(separated: GatewayBench, role: Any) -> None:
    async with separated.client(role, tenant="a") as client:
        listed = (await client.get("/v1/policies")).json()
        assert [each["name"] for each in listed] == ["joint", "of-a", "strict"]
        assert (await client.get("/v1/policies/of-a")).json()["document"]["name"] == "of-a"
        assert (await client.get("/v1/policies/strict@1")).status_code == 200
        assert (await client.get("/v1/policies/strict/history")).json()[0]["to"] == 1
        for name in ("of-b", "default", "tenants"):
            for path in (f"{name}", f"{name}@1", f"{name}/history"):
                hidden = await client.get(f"/v1/policies/{path}")
                assert (hidden.status_code, hidden.json()["type"]) == (404, f"{TYPE_PREFIX}not-found"), path
                absent = await client.get(f"/v1/policies/{path.replace(name, 'no-such')}")
                assert seen(hidden, name) == seen(absent, "no-such"), path


async def test_an_admin_of_a_tenant_changes_only_policies_that_no_other_tenant_uses(separated: GatewayBench) -> None:
    before = {name: separated.registry.list_changes(name) for name in ("of-b", "default", "tenants", "joint")}
    async with separated.client("admin", tenant="a") as client:
        for name in ("of-a", "strict"):
            published = await client.post("/v1/policies", json={"name": name})
            assert published.status_code == 201, published.text
            activated = await client.post(f"/v1/policies/{name}/activate", json={"version": 2})
            assert activated.json()["to"] == 2
            assert (await client.post(f"/v1/policies/{name}/rollback")).json()["to"] == 1
        for name in ("of-b", "no-such", "default", "joint"):
            refused = await client.post("/v1/policies", json={"name": name})
            assert (refused.status_code, refused.json()["type"]) == (403, f"{TYPE_PREFIX}not-permitted"), name
        document = {"kind": "tenants", "name": "tenants", "tenants": {"a": "of-b"}}
        assert (await client.post("/v1/policies", json=document)).status_code == 403
        for name in ("of-b", "tenants", "default", "joint"):
            for action, body in (("activate", {"version": 1}), ("rollback", {})):
                refused = await client.post(f"/v1/policies/{name}/{action}", json=body)
                assert refused.status_code == (403 if name == "joint" else 404), (name, action)
    assert {name: separated.registry.list_changes(name) for name in before} == before
    assert [separated.registry.list_versions(name) for name in before] == [[1], [1], [1], [1]]


async def test_an_admin_may_change_a_shared_policy_that_the_key_names(separated: GatewayBench) -> None:
    async with client_of(separated, role="admin", tenant="a", policies=["joint"]) as client:
        assert (await client.post("/v1/policies", json={"name": "joint"})).status_code == 201
        assert (await client.post("/v1/policies", json={"name": "of-a"})).status_code == 403
        assert [each["name"] for each in (await client.get("/v1/policies")).json()] == ["joint"]
    async with client_of(separated, role="admin", all_tenants=True) as client:
        names = [each["name"] for each in (await client.get("/v1/policies")).json()]
        assert names == ["default", "joint", "of-a", "of-b", "strict", "tenants"]
        assert (await client.post("/v1/policies", json={"name": "default"})).status_code == 201


async def test_an_admin_can_be_limited_though_tenants_are_not_separated(bench: GatewayBench) -> None:
    publish(bench, "shop")
    async with client_of(bench, role="admin", tenant="a", policies=["shop"]) as client, bench.client("admin") as admin:
        assert (await client.post("/v1/policies", json={"name": "shop"})).status_code == 201
        assert (await client.post("/v1/policies", json={"name": "default"})).status_code == 403
        assert (await client.post("/v1/policies/default/activate", json={"version": 1})).status_code == 404
        assert [each["name"] for each in (await client.get("/v1/policies")).json()] == ["shop"]
        assert (await admin.post("/v1/policies", json={"name": "default"})).status_code == 201
