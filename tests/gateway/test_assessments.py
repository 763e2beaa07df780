"""Assessments: by reference and by upload, waited for or asked for later, each judged once."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from services.core.errors import RedisUnavailable
from services.core.settings import Settings
from services.core.values import Assessment, Detail, PreparedImage
from services.gateway import assessment_store
from services.gateway.admission import Admission
from services.gateway.api_keys import ApiKey
from services.gateway.assessment_store import AssessmentStore
from services.gateway.problems import PREFIX, HttpProblem
from services.gateway.rate_limits import RateLimiter
from services.gateway.request_bodies import BodyMemory
from services.gateway.routes.assessments import Assessments
from services.policies.redis_cache import PolicyRedisCache
from tests.support.gateway_bench import JPEG, OTHER_JPEG, Bench, Gate, data_url, unsafe

SCHEMA = json.loads((Path(__file__).parents[2] / "infra" / "schemas" / "verdict.schema.json").read_text())
PATH = "/v1/assessments"


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return unsafe()


Away = Callable[..., None]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    """Says which scripts Redis does not answer from now on; with `runs` it runs them all the same."""
    scripts: tuple[str, ...] = ()
    are_run = False
    answer = PolicyRedisCache.run

    async def run(self: PolicyRedisCache, script: str, keys: Sequence[str], *arguments: str | float) -> Any:
        if script not in scripts:
            return await answer(self, script, keys, *arguments)
        if are_run:
            await answer(self, script, keys, *arguments)
        raise RedisUnavailable("away")

    def set_away(*given: str, runs: bool = False) -> None:
        nonlocal scripts, are_run
        scripts, are_run = given, runs

    monkeypatch.setattr(PolicyRedisCache, "run", run)
    return set_away


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody works on is noticed soon."""
    monkeypatch.setattr(assessment_store, "_ALIVE_S", 2)
    monkeypatch.setattr(assessment_store, "_HEARTBEAT_S", 0.2)


def form(data: bytes = JPEG) -> dict[str, Any]:
    return {"files": {"file": ("picture.txt", data, "text/plain")}}


async def test_by_reference_by_upload_and_by_data_url(bench: Bench) -> None:
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


async def test_a_score_alone(bench: Bench) -> None:
    async with bench.client() as client:
        answer = await client.post(f"{PATH}?wait=20", **form(), data={"detail": "score"})
    assert "verdict" not in bench.guard.calls
    verdict = answer.json()
    assert (verdict["score"], verdict["action"], verdict["category"]) == (0.02, "allow", None)


async def test_who_does_not_wait_long_enough_asks_again(bench: Bench) -> None:
    gate = bench.guard.script = Gate()
    async with bench.client() as client, bench.client(tenant="other") as stranger:
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
            hidden = await stranger.get(location)
            assert (hidden.status_code, hidden.json()["type"]) == (404, f"{PREFIX}not-found")


async def test_an_assessment_whose_process_has_ended(bench: Bench) -> None:
    gate = bench.guard.script = Gate()
    other = Bench(bench.settings, bench.preparer)
    other.guard.script = gate
    await other.start()
    async with bench.client() as client:
        other._tokens = bench._tokens
        async with other.client() as elsewhere:
            location = (await elsewhere.post(PATH, **form())).headers["location"]
        assert (await client.get(location)).status_code == 202, "another process judges it"
        await other.close()
        lost = await client.get(location)
    assert (lost.status_code, lost.json()["type"]) == (503, f"{PREFIX}interrupted")
    assert lost.headers["retry-after"]


async def test_an_idempotency_key_is_judged_once(bench: Bench) -> None:
    gate = bench.guard.script = Gate()
    async with bench.client(**{"Idempotency-Key": "order-7"}) as client:
        posts = [asyncio.create_task(client.post(f"{PATH}?wait=20", **form())) for _ in range(5)]
        await gate.until_waiting(1)
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
            assert (reused.status_code, reused.json()["type"]) == (422, f"{PREFIX}idempotency-key-reused")
        assert bench.guard.calls.count("verdict") == 1
    async with bench.client("admin", **{"Idempotency-Key": "order-7"}) as other_key:
        assert (await other_key.post(f"{PATH}?wait=20", **form(OTHER_JPEG))).status_code == 200, "keys are one's own"


async def test_an_idempotency_key_of_what_failed_for_a_passing_reason_may_be_tried_again(bench: Bench) -> None:
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
            assert (refused.status_code, refused.json()["type"]) == (422, f"{PREFIX}not-an-image")


@pytest.mark.parametrize("script", [assessment_store._CLAIM, assessment_store._REPLACE], ids=["claim", "replace"])
async def test_what_redis_took_without_an_answer_is_judged_when_it_is_sent_again(
    quick: None, bench: Bench, away: Away, script: str
) -> None:
    async def fails(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise ZeroDivisionError

    async with bench.client(**{"Idempotency-Key": "order-10"}) as client:
        if script is assessment_store._REPLACE:
            bench.guard.script = fails
            assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 500
        bench.guard.script = says_unsafe
        before = bench.guard.calls.count("verdict")
        away(script, runs=True)
        assert (await client.post(f"{PATH}?wait=20", **form())).status_code == 503
        away()
        promised = await client.post(PATH, **form())
        assert promised.status_code == 202
        lost = await client.get(f"{promised.headers['location']}?wait=20")
        assert (lost.status_code, lost.json()["type"]) == (503, f"{PREFIX}interrupted")
        assert (await client.post(PATH, **form(OTHER_JPEG))).status_code == 422, "the key is still that of the first"
        again = [await client.post(f"{PATH}?wait=20", **form()) for _ in range(2)]
    assert [answer.status_code for answer in again] == [200, 200]
    assert bench.guard.calls.count("verdict") == before + 1


async def test_what_takes_long_is_pending_everywhere_until_it_ends(quick: None, bench: Bench) -> None:
    gate = bench.guard.script = Gate()
    other = Bench(bench.settings, bench.preparer)
    other._tokens = bench._tokens
    await other.start()
    async with bench.client(**{"Idempotency-Key": "a"}) as here, other.client(**{"Idempotency-Key": "a"}) as elsewhere:
        begun = await here.post(PATH, **form())
        await asyncio.sleep(4)
        for client in (here, elsewhere):
            again = await client.post(PATH, **form())
            assert (again.status_code, again.headers["location"]) == (202, begun.headers["location"])
        gate.opened.set()
        assert (await elsewhere.get(f"{begun.headers['location']}?wait=20")).status_code == 200
    assert "verdict" not in other.guard.calls
    await other.close()


async def test_a_verdict_outlives_an_outage_of_redis(quick: None, bench: Bench, away: Away) -> None:
    gate = bench.guard.script = Gate()
    other = Bench(bench.settings, bench.preparer)
    other._tokens = bench._tokens
    await other.start()
    async with bench.client(**{"Idempotency-Key": "b"}) as here, other.client() as elsewhere:
        location = (await here.post(PATH, **form())).headers["location"]
        await gate.until_waiting(1)
        away(assessment_store._FINISH)
        gate.opened.set()
        known = await here.get(f"{location}?wait=20")
        await asyncio.sleep(0.5)
        assert known.status_code == 200
        assert (await here.get(location)).text == (await here.post(PATH, **form())).text == known.text
        assert (await elsewhere.get(location)).status_code == 202
        away()
        assert (await elsewhere.get(f"{location}?wait=20")).text == known.text
    assert gate.waiting == 1
    await other.close()


async def test_an_end_that_redis_has_not_taken_is_kept_before_the_process_ends(valkey_url: str, away: Away) -> None:
    shared = PolicyRedisCache(valkey_url, uuid.uuid4().hex)
    other = AssessmentStore(shared, keep_s=60)
    async with AssessmentStore(shared, keep_s=60) as mine:
        promised = mine.pending("shop")
        await mine.create(promised)
        away(assessment_store._FINISH)
        await mine.finish(promised.model_copy(update={"status": "failed"}))
        assert await other.get(promised.id) == promised
        away()
    known = await other.get(promised.id)
    assert known is not None
    assert (known.status, known.problem) == ("failed", None)
    await shared.close()


async def test_a_promise_that_comes_late_does_not_undo_an_end(valkey_url: str) -> None:
    shared = PolicyRedisCache(valkey_url, uuid.uuid4().hex)
    async with AssessmentStore(shared, keep_s=60) as mine:
        promised = mine.pending("shop")
        failed = promised.model_copy(update={"status": "failed"})
        with mine.renewing(promised):
            await mine.finish(failed)
            await mine.create(promised)
            await mine._renew()
        assert await mine.get(promised.id) == failed
        _, left_s = await shared.run(assessment_store._GET, [mine._key("assessment", promised.id)])
        assert left_s <= 60, "its life is that of an end"
    await shared.close()


@pytest.mark.parametrize("is_away", [False, True], ids=["redis", "no redis"])
async def test_what_a_job_over_the_limit_holds_is_given_back_at_once(
    valkey_url: str, away: Away, is_away: bool
) -> None:
    shared = PolicyRedisCache(valkey_url, uuid.uuid4().hex)
    limiter, memory = RateLimiter(shared, Settings(gateway_concurrency=1)), BodyMemory(1000)
    admission = Admission(limiter, memory, shedder=None)  # type: ignore[arg-type]
    mine = AssessmentStore(shared, keep_s=60)
    key = ApiKey(id="0" * 16, name="n", role="admin", tenant="shop", digest="", created_at="2026-01-01T00:00:00Z")
    jobs: Any = Assessments(mine)
    promised = mine.pending("shop")
    if is_away:
        away(assessment_store._FINISH)
    async with admission.admit(key, "moderate") as admitted:
        admitted.memory.reserve(100)
        with limiter.concurrency_slot(key, "jobs"), pytest.raises(HttpProblem, match="jobs at a time"):
            await jobs.start(promised, None, admitted)
        assert memory.used == 0
    known = await mine.get(promised.id)
    assert known is not None
    assert known.status == "failed", "nobody waits for it"
    await shared.close()


async def test_what_is_refused(bench: Bench) -> None:
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
            assert (answer.status_code, answer.json()["type"]) == (status, PREFIX + kind), (request, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["status"] == status
            assert answer.json()["detail"]
        for wait in ("-1", "301", "nan", "soon"):
            answer = await client.post(f"{PATH}?wait={wait}", json={"uri": uri})
            assert (answer.status_code, answer.json()["type"]) == (422, f"{PREFIX}invalid")
    assert "verdict" not in bench.guard.calls
