"""Policies over HTTP: publishing, rollouts, roles, and refused requests."""

import pytest

from services.gateway.api_keys import Role
from services.gateway.problems import TYPE_PREFIX
from tests.support.gateway_bench import GatewayBench, data_url

PATH = "/v1/policies"


async def test_policy_is_published_activated_and_rolled_back(bench: GatewayBench) -> None:
    async with bench.client("admin") as admin, bench.client("review") as reviewer, bench.client() as client:
        published = await admin.post(PATH, content=b"name: default\ncategories: {O2: waive}\n")
        assert published.status_code == 201
        assert published.headers["location"] == f"{PATH}/default@2"
        assert "O2" in published.json()["warnings"][0]
        as_json = await admin.post(PATH, json={"name": "shop", "thresholds": {"review": 0.4, "block": 0.8}})
        assert (as_json.json()["name"], as_json.json()["version"]) == ("shop", 1)

        shown = (await reviewer.get(f"{PATH}/default@2")).json()
        assert shown["document"] == {"name": "default", "categories": {"O2": {"mode": "waive"}}}
        assert shown["digest"] == published.json()["digest"]
        assert (await reviewer.get(f"{PATH}/default")).json()["version"] == 1, (
            "without a version, the active one is shown"
        )
        listed = {each["name"]: each for each in (await reviewer.get(PATH)).json()}
        assert (listed["default"]["versions"], listed["default"]["active"]) == (2, 1)
        assert listed["shop"]["active"] is None

        activated = await admin.post(f"{PATH}/default/activate", json={"version": 2, "why": "knives"})
        assert (activated.json()["from"], activated.json()["to"], activated.json()["why"]) == (1, 2, "knives")
        moderated = await client.post(
            "/v1/moderations", json={"input": {"type": "image_url", "image_url": {"url": data_url()}}}
        )
        assert moderated.json()["results"][0]["policy"]["version"] == 2, "the activation takes effect at once"
        assert (await admin.post(f"{PATH}/default/rollback")).json()["to"] == 1
        history = (await reviewer.get(f"{PATH}/default/history")).json()
    assert [(each["action"], each["to"], each["who"]) for each in history] == [
        ("activate", 1, "sluice"),
        ("activate", 2, "admin of default"),
        ("rollback", 1, "admin of default"),
    ]


async def test_invalid_requests_are_refused(bench: GatewayBench) -> None:
    async with bench.client("admin") as admin:
        for path in ("absent", "default@9", "default@x", "No Name", "absent/history"):
            answer = await admin.get(f"{PATH}/{path}")
            assert (answer.status_code, answer.json()["type"]) == (404, f"{TYPE_PREFIX}not-found"), path
        wrong = await admin.post(PATH, content=b"name: shop\nthresholds: {review: 2}\ncolour: red\n")
        assert (wrong.status_code, wrong.json()["type"]) == (422, f"{TYPE_PREFIX}bad-policy")
        assert {(each["line"], each["field"]) for each in wrong.json()["problems"]} >= {(3, "colour")}
        for body in (b"", b"\xff\xfe", b"a: &a [*a]", b"name: [" * 2000, b"name: x\nkind: " + b"y" * 300_000):
            assert (await admin.post(PATH, content=body)).json()["type"] == f"{TYPE_PREFIX}bad-policy"
        absent = await admin.post(f"{PATH}/default/activate", json={"version": 9})
        assert (absent.status_code, absent.json()["type"]) == (404, f"{TYPE_PREFIX}not-found")
        for body in ({}, {"version": 0}, {"version": "one"}, {"version": 1, "who": "someone else"}, []):
            answer = await admin.post(f"{PATH}/default/activate", json=body)
            assert (answer.status_code, answer.json()["type"]) == (422, f"{TYPE_PREFIX}invalid")
        first = await admin.post(f"{PATH}/default/rollback", json={"why": "never mind"})
        assert (first.status_code, first.json()["type"]) == (409, f"{TYPE_PREFIX}policy-conflict")


@pytest.mark.parametrize(("role", "may_read"), [("moderate", False), ("review", True)])
async def test_role_limits_reading_and_changing(bench: GatewayBench, role: Role, may_read: bool) -> None:
    async with bench.client(role) as client:
        for path in ("", "/default", "/default/history"):
            answer = await client.get(PATH + path)
            assert answer.status_code == (200 if may_read else 403)
            if not may_read:
                assert answer.json()["type"] == f"{TYPE_PREFIX}not-permitted"
        for path in ("", "/default/activate", "/default/rollback"):
            assert (await client.post(PATH + path, json={"version": 1})).status_code == 403
    assert len(bench.registry.list_changes("default")) == 1
