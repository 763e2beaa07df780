"""Assessments: by reference and by upload, at once or later, and idempotency keys."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from services.core.errors import RedisUnavailable
from services.core.values import Assessment, Detail, PreparedImage
from services.gateway.assessment_store import AssessmentStore
from services.gateway.problems import TYPE_PREFIX
from tests.support.gateway_bench import JPEG, OTHER_JPEG, Gate, GatewayBench, age_assessment, data_url, unsafe

SCHEMA = json.loads((Path(__file__).parents[2] / "infra" / "schemas" / "verdict.schema.json").read_text())
PATH = "/v1/assessments"


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return unsafe()


@contextmanager
def lost_answers(method: str) -> Iterator[None]:
    """Redis executes a method of the store, but the process gets an error, until the block ends."""
    execute = getattr(AssessmentStore, method)

    async def execute_and_fail(self: AssessmentStore, *arguments: Any) -> None:
        await execute(self, *arguments)
        raise RedisUnavailable("the answer was lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AssessmentStore, method, execute_and_fail)
        yield


@asynccontextmanager
async def second_gateway(bench: GatewayBench) -> AsyncIterator[GatewayBench]:
    """Start another gateway with the same backends and API keys."""
    other = GatewayBench(bench.settings, bench.preparer)
    other.share_keys_of(bench)
    await other.start()
    try:
        yield other
    finally:
        await other.close()


def form(data: bytes = JPEG) -> dict[str, Any]:
    return {"files": {"file": ("picture.txt", data, "text/plain")}}


async def test_image_by_reference_upload_or_data_url_gets_a_verdict(bench: GatewayBench) -> None:
    bench.guard.script = says_unsafe
    uri = bench.put("assessments/a.jpg")
    async with bench.client(tenant="shop") as client:
        reference = await client.post(f"{PATH}?wait=20", json={"uri": uri, "id": "mine", "policy": "default@1"})
        upload = await client.post(f"{PATH}?wait=20", **form(), data={"request": '{"id": "mine"}', "policy": "default"})
        inline = await client.post(f"{PATH}?wait=20", json={"uri": data_url()})
        for answer in (reference, upload, inline):
            assert answer.status_code == 200, answer.text
            jsonschema.validate(answer.json(), SCHEMA)
            assert (answer.json()["tenant"], answer.json()["action"]) == ("shop", "block")
            again = await client.get(answer.headers["location"])
            assert again.json() == answer.json()
    digest = hashlib.sha256(JPEG).hexdigest()
    assert (reference.json()["uri"], reference.json()["submission_id"]) == (uri, "mine")
    assert reference.json()["etag"]
    assert (upload.json()["uri"], upload.json()["submission_id"]) == (f"upload:sha256:{digest}", "mine")
    assert upload.json()["sha256"] == digest
    assert inline.json()["uri"] == upload.json()["uri"]
    assert inline.json()["submission_id"] == inline.headers["location"].rpartition("/")[2]


async def test_detail_score_gives_a_verdict_without_category(bench: GatewayBench) -> None:
    async with bench.client() as client:
        answer = await client.post(f"{PATH}?wait=20", **form(), data={"detail": "score"})
    assert "verdict" not in bench.guard.calls
    verdict = answer.json()
    assert (verdict["score"], verdict["action"], verdict["category"]) == (0.02, "allow", None)


async def test_verdict_after_the_wait_is_found_at_the_location(bench: GatewayBench) -> None:
    gate = bench.guard.script = Gate()
    async with bench.client() as client, bench.client(tenant="other") as other:
        at_once = await client.post(PATH, **form())
        later = await client.post(f"{PATH}?wait=0.05", **form())
        for answer in (at_once, later):
            assert (answer.status_code, answer.json()["status"]) == (202, "pending")
            assert answer.headers["location"] == f"{PATH}/{answer.json()['id']}"
            pending = await client.get(answer.headers["location"])
            assert (pending.status_code, pending.json()) == (202, answer.json())
        gate.opened.set()
        done = await client.get(f"{at_once.headers['location']}?wait=20")
        assert (done.status_code, done.json()["action"]) == (200, "block")
        for location in (at_once.headers["location"], f"{PATH}/{'0' * 32}", f"{PATH}/nothing"):
            hidden = await other.get(location)
            assert (hidden.status_code, hidden.json()["type"]) == (404, f"{TYPE_PREFIX}not-found")


async def test_assessment_of_an_ended_process_is_interrupted(bench: GatewayBench) -> None:
    async with bench.client() as client:
        async with second_gateway(bench) as other:
            other.guard.script = Gate()
            async with other.client() as elsewhere:
                location = (await elsewhere.post(PATH, **form())).headers["location"]
            assert (await client.get(location)).status_code == 202, "another process judges it"
        lost = await client.get(location)
    assert (lost.status_code, lost.json()["type"]) == (503, f"{TYPE_PREFIX}interrupted")
    assert lost.headers["retry-after"]


async def test_requests_with_one_idempotency_key_are_judged_once(bench: GatewayBench) -> None:
    gate = bench.guard.script = Gate()
    async with bench.client(**{"Idempotency-Key": "order-7"}) as client:
        posts = [asyncio.create_task(client.post(f"{PATH}?wait=20", **form())) for _ in range(5)]
        await gate.wait_for_calls(1)
        quick = await client.post(PATH, **form())
        assert quick.status_code == 202
        gate.opened.set()
        answers = [await post for post in posts]
        assert [answer.status_code for answer in answers] == [200] * 5
        assert len({answer.text for answer in answers}) == 1
        assert answers[0].headers["location"] == quick.headers["location"]
        assert bench.guard.calls.count("verdict") == 1
        for other in ({**form(OTHER_JPEG)}, {**form(), "data": {"detail": "score"}}):
            reused = await client.post(f"{PATH}?wait=20", **other)
            assert (reused.status_code, reused.json()["type"]) == (422, f"{TYPE_PREFIX}idempotency-key-reused")
        assert bench.guard.calls.count("verdict") == 1
    async with bench.client("admin", **{"Idempotency-Key": "order-7"}) as other_key:
        answer = await other_key.post(f"{PATH}?wait=20", **form(OTHER_JPEG))
        assert answer.status_code == 200, "another API key has its own idempotency keys"


async def test_idempotency_key_after_a_temporary_failure_is_judged_again(bench: GatewayBench) -> None:
    async def fails(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise ZeroDivisionError

    bench.guard.script = fails
    async with bench.client(**{"Idempotency-Key": "order-8"}) as client:
        assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 500
        bench.guard.script = says_unsafe
        assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 200
    async with bench.client(**{"Idempotency-Key": "order-9"}) as client:
        for _ in range(2):
            refused = await client.post(f"{PATH}?wait=20", **form(b"text"))
            assert (refused.status_code, refused.json()["type"]) == (422, f"{TYPE_PREFIX}not-an-image")


@pytest.mark.parametrize("method", ["claim", "replace"])
async def test_idempotency_key_with_a_lost_answer_of_redis_is_judged_when_sent_again(
    bench: GatewayBench, method: str
) -> None:
    async def fails(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise ZeroDivisionError

    async with bench.client(**{"Idempotency-Key": "order-10"}) as client:
        if method == "replace":
            bench.guard.script = fails
            assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 500
        bench.guard.script = says_unsafe
        before = bench.guard.calls.count("verdict")
        with lost_answers(method):
            assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 503
        pending = await client.post(PATH, **form())
        assert pending.status_code == 202
        await age_assessment(bench.redis_cache, pending.json()["id"], by_s=100)
        lost = await client.get(pending.headers["location"])
        assert (lost.status_code, lost.json()["type"]) == (503, f"{TYPE_PREFIX}interrupted")
        assert (await client.post(PATH, **form(OTHER_JPEG))).status_code == 422, "the key belongs to the first request"
        again = [await client.post(f"{PATH}?wait=20", **form()) for _ in range(2)]
    assert [answer.status_code for answer in again] == [200, 200]
    assert bench.guard.calls.count("verdict") == before + 1


async def test_slow_assessment_is_pending_in_all_gateways_until_its_verdict(bench: GatewayBench) -> None:
    gate = bench.guard.script = Gate()
    key = {"Idempotency-Key": "a"}
    async with second_gateway(bench) as other, bench.client(**key) as here, other.client(**key) as elsewhere:
        begun = await here.post(PATH, **form())
        await age_assessment(bench.redis_cache, begun.json()["id"], by_s=100)
        await bench.app.state.assessment_store.send_heartbeat()
        for client in (here, elsewhere):
            again = await client.post(PATH, **form())
            assert (again.status_code, again.headers["location"]) == (202, begun.headers["location"])
        gate.opened.set()
        assert (await elsewhere.get(f"{begun.headers['location']}?wait=20")).status_code == 200
        assert "verdict" not in other.guard.calls


async def test_verdict_during_an_outage_of_redis_is_saved_afterwards(bench: GatewayBench) -> None:
    gate = bench.guard.script = Gate()
    async with (
        second_gateway(bench) as other,
        bench.client(**{"Idempotency-Key": "b"}) as here,
        other.client() as elsewhere,
    ):
        location = (await here.post(PATH, **form())).headers["location"]
        await gate.wait_for_calls(1)
        bench.redis_cache.is_down = True
        gate.opened.set()
        known = await here.get(f"{location}?wait=20")
        assert known.status_code == 200
        assert (await here.get(location)).text == known.text
        assert (await elsewhere.get(location)).status_code == 202
        bench.redis_cache.is_down = False
        await bench.app.state.assessment_store.send_heartbeat()
        assert (await elsewhere.get(location)).text == known.text
        assert (await here.post(PATH, **form())).text == known.text
    assert gate.calls == 1


async def test_invalid_requests_are_refused(bench: GatewayBench) -> None:
    uri = bench.put("assessments/b.jpg")
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"json": {"uri": "s3://uploads/absent"}}, 422, "image-not-found"),
        ({"json": {"uri": "s3://elsewhere/a"}}, 403, "image-forbidden"),
        ({"json": {"uri": uri, "etag": "another"}}, 409, "image-changed"),
        ({"json": {"uri": uri, "policy": "absent"}}, 422, "unknown-policy"),
        ({"json": {"uri": uri, "policy": "default@77"}}, 422, "unknown-policy"),
        ({"json": {"uri": "https://example.com/a.jpg"}}, 422, "url-refused"),
        ({"json": {"uri": "upload:sha256:" + "0" * 64}}, 422, "invalid"),
        ({"json": {"uri": uri, "detail": "poem"}}, 422, "invalid"),
        ({"json": {"uri": uri, "colour": "red"}}, 422, "invalid"),
        ({"json": {"etag": "a"}}, 422, "invalid"),
        ({"json": [uri]}, 422, "invalid"),
        ({"content": b"{"}, 415, "unsupported-media-type"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "malformed"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, "malformed"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "malformed"),
        ({"files": {"picture": ("a.jpg", JPEG)}}, 422, "invalid"),
        ({"files": {"file": ("a.jpg", JPEG)}, "data": {"uri": uri}}, 422, "invalid"),
        ({"files": {"file": ("a.jpg", JPEG)}, "data": {"request": "[]"}}, 422, "invalid"),
        ({"files": {"file": ("a.jpg", JPEG)}, "data": {"id": "x" * 257}}, 422, "invalid"),
        ({"files": [("file", ("a.jpg", JPEG)), ("file", ("b.jpg", JPEG))]}, 400, "malformed"),
        ({"data": {"policy": "default"}, "files": {}}, 415, "unsupported-media-type"),
        (form(b"PK\x03\x04 a zip that calls itself an image"), 422, "not-an-image"),
        (form(JPEG[: len(JPEG) // 2]), 422, "not-an-image"),
    ]
    async with bench.client() as client:
        for request, status, kind in refused:
            answer = await client.post(f"{PATH}?wait=20", **request)
            assert (answer.status_code, answer.json()["type"]) == (status, TYPE_PREFIX + kind), (request, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["status"] == status
            assert answer.json()["detail"]
        for wait in ("-1", "301", "nan", "soon"):
            answer = await client.post(f"{PATH}?wait={wait}", json={"uri": uri})
            assert (answer.status_code, answer.json()["type"]) == (422, f"{TYPE_PREFIX}invalid")
    assert "verdict" not in bench.guard.calls
