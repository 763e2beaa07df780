"""An attacker with full write access to Redis has no assessment of his own served, and is noticed."""

import json
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from services.core.redis_signatures import RedisSigner
from services.core.values import Assessment, Detail, PreparedImage
from services.gateway import assessment_store
from services.gateway.assessment_store import AssessmentStore, Claim, StoredAssessment
from tests.support.fake_guard import says_safe
from tests.support.gateway_bench import Gate, GatewayBench, data_url, unsafe
from tests.support.policies import SIGNING_KEY, becomes

PATH = "/v1/assessments"


async def says_unsafe(_image: PreparedImage, _detail: Detail) -> Assessment:
    return unsafe()


@pytest.fixture
async def signing(idle: GatewayBench) -> GatewayBench:
    """A gateway with a signing key, whose guard blocks every image."""
    idle.configure(redis_signing_key=SIGNING_KEY)
    idle.guard.script = says_unsafe
    await idle.start()
    return idle


def name_of(bench: GatewayBench, assessment_id: str) -> str:
    return bench.redis_cache.key("gateway", "assessment", assessment_id)


def forge(original: bytes, how: str, bench: GatewayBench, kind: str, name: str, **changes: object) -> str:
    """Return the entry with some fields changed, signed in one of the ways that an attacker has."""
    document = json.loads(original)
    signature = document.pop("signature")
    body = json.dumps(document | changes)
    match how:
        case "unsigned":
            return body
        case "the signature of the original":
            return json.dumps({"signature": signature} | document | changes, separators=(",", ":"))
        case "a key of its own":
            return RedisSigner(SecretStr("x" * 32), bench.redis_cache.key("")).sign_json(kind, name, body)
        case _:
            return how


WAYS = pytest.mark.parametrize("how", ["unsigned", "the signature of the original", "a key of its own"])


async def post(bench: GatewayBench, **headers: str) -> tuple[str, str]:
    """Judge an image. Returns the action and the id of the assessment."""
    async with bench.client(**headers) as client:
        answer = await client.post(f"{PATH}?wait=20", json={"uri": data_url()})
    assert answer.status_code == 200, answer.text
    return answer.json()["action"], answer.headers["location"].rpartition("/")[2]


@WAYS
async def test_forged_assessment_is_not_served(
    signing: GatewayBench, forgeries: Counter[str], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    client = signing.redis_cache.client
    _, assessment_id = await post(signing)
    original = await client.get(name_of(signing, assessment_id))
    verdict = json.loads(original)["verdict"] | {"action": "allow", "rating": "Safe", "score": 0.0}
    forged = forge(original, how, signing, "assessment", assessment_id, verdict=verdict)
    await client.set(name_of(signing, assessment_id), forged)
    async with signing.client() as http:
        answer = await http.get(f"{PATH}/{assessment_id}")
        assert answer.status_code == 404, answer.text
        assert forgeries == {"assessment": 1}
        assert f"FORGERY IN REDIS: the entry of assessment {assessment_id}" in caplog.text
        await client.set(name_of(signing, assessment_id), original)
        answer = await http.get(f"{PATH}/{assessment_id}")
        assert answer.json()["action"] == "block"


async def test_assessment_of_another_image_is_not_served(signing: GatewayBench, forgeries: Counter[str]) -> None:
    """The attacker copies an entry that a gateway has signed for another assessment."""

    client = signing.redis_cache.client
    signing.guard.script = says_safe
    harmless = await post(signing)
    signing.guard.script = says_unsafe
    blocked = await post(signing)
    assert (harmless[0], blocked[0]) == ("allow", "block")
    await client.copy(name_of(signing, harmless[1]), name_of(signing, blocked[1]), replace=True)
    async with signing.client() as http:
        assert (await http.get(f"{PATH}/{blocked[1]}")).status_code == 404
    assert forgeries == {"assessment": 1}


@WAYS
async def test_forged_result_of_an_idempotency_key_is_judged_again(
    signing: GatewayBench, forgeries: Counter[str], how: str
) -> None:
    client = signing.redis_cache.client
    key = {"Idempotency-Key": "order-1"}
    _, first = await post(signing, **key)
    original = await client.get(name_of(signing, first))
    verdict = json.loads(original)["verdict"] | {"action": "allow"}
    await client.set(
        name_of(signing, first), forge(original, how, signing, "assessment", first, verdict=verdict), keepttl=True
    )
    action, second = await post(signing, **key)
    assert (action, second != first) == ("block", True)
    assert forgeries == {"assessment": 1}
    assert await post(signing, **key) == ("block", second), "the new claim holds"


@WAYS
async def test_forged_claim_of_an_idempotency_key_is_replaced(
    signing: GatewayBench, forgeries: Counter[str], how: str
) -> None:
    """The claim leads to the assessment of another image, whose entry is genuine."""
    client = signing.redis_cache.client
    key = {"Idempotency-Key": "order-2"}
    _, harmless = await post(signing)
    _, first = await post(signing, **key)
    (name,) = [name async for name in client.scan_iter(signing.redis_cache.key("gateway", "idempotency", "*"))]
    forged = forge(
        await client.get(name), how, signing, "idempotency_key", name.decode().rpartition(":")[2], assessment=harmless
    )
    assert Claim.model_validate_json(forged).assessment_id == harmless
    await client.set(name, forged)
    action, second = await post(signing, **key)
    assert (action, second in {first, harmless}) == ("block", False)
    assert forgeries == {"idempotency_key": 1}
    assert await post(signing, **key) == ("block", second), "the new claim holds"


async def test_forgery_during_the_judgement_does_not_reach_the_client(
    signing: GatewayBench, forgeries: Counter[str]
) -> None:
    signing.guard.script = gate = Gate()
    client = signing.redis_cache.client
    async with signing.client() as http:
        location = (await http.post(PATH, json={"uri": data_url()})).headers["location"]
        await gate.wait_for_calls(1)
        name = name_of(signing, location.rpartition("/")[2])
        done = {"id": location.rpartition("/")[2], "tenant": "default", "status": "failed", "problem": {"status": 422}}
        await client.set(name, json.dumps(done))
        assert (await http.get(location)).status_code in {202, 404}
        gate.opened.set()

        async def action() -> str | None:
            answer = await http.get(location)
            return str(answer.json()["action"]) if answer.status_code == 200 else None

        await becomes("block", action)
    assert forgeries["assessment"] >= 1


@pytest.mark.parametrize(
    "garbage", ["", "{", "[]", "null", '{"signature":"', '{"signature":"' + "0" * 64 + '","id":1}']
)
@pytest.mark.parametrize("key", [None, SIGNING_KEY], ids=["no key", "key"])
async def test_garbage_in_redis_is_no_server_error(
    idle: GatewayBench, forgeries: Counter[str], garbage: str, key: SecretStr | None
) -> None:
    idle.configure(redis_signing_key=key)
    idle.guard.script = says_unsafe
    await idle.start()
    client = idle.redis_cache.client
    header = {"Idempotency-Key": "order-3"}
    _, first = await post(idle, **header)
    (name,) = [name async for name in client.scan_iter(idle.redis_cache.key("gateway", "idempotency", "*"))]
    await client.set(name, garbage)
    await client.set(name_of(idle, first), garbage)
    async with idle.client() as http:
        assert (await http.get(f"{PATH}/{first}")).status_code == 404
    action, second = await post(idle, **header)
    assert (action, second != first) == ("block", True)
    assert forgeries == {"assessment": 1, "idempotency_key": 1}


async def test_entries_of_another_type_count_as_absent(signing: GatewayBench, forgeries: Counter[str]) -> None:
    client = signing.redis_cache.client
    header = {"Idempotency-Key": "order-6"}
    _, first = await post(signing, **header)
    (claim,) = [name async for name in client.scan_iter(signing.redis_cache.key("gateway", "idempotency", "*"))]
    for name in (claim.decode(), name_of(signing, first)):
        await client.delete(name)
        await client.rpush(name, "x")  # type: ignore[misc]
    async with signing.client() as http:
        assert (await http.get(f"{PATH}/{first}")).status_code == 404
    action, second = await post(signing, **header)
    assert (action, second != first) == ("block", True)
    assert await post(signing, **header) == ("block", second), "the new claim holds"
    assert forgeries == {"assessment": 1, "idempotency_key": 1}


async def test_pending_entry_of_another_type_does_not_stop_the_heartbeat(signing: GatewayBench) -> None:
    client, store = (
        signing.redis_cache.client,
        AssessmentStore(signing.redis_cache, signing.redis_cache.signer, keep_s=60),
    )
    spoilt, other = store.build_pending("default"), store.build_pending("default")
    await store.create(other)
    await client.expire(name_of(signing, other.id), 60)
    await client.rpush(name_of(signing, spoilt.id), "x")  # type: ignore[misc]
    with store.renew(spoilt), store.renew(other):
        await store.send_heartbeat()
    assert await client.ttl(name_of(signing, other.id)) > 60


async def test_claim_that_is_forged_again_and_again_does_not_stop_a_request(
    signing: GatewayBench, forgeries: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = signing.redis_cache.client, signing.redis_cache.run
    name = signing.redis_cache.key("gateway", "idempotency", "")

    async def run_after_the_attacker(script: str, keys: list[str], *arguments: str) -> object:
        if keys[0].startswith(name):
            await client.set(keys[0], f"{len(forgeries)} {forgeries.total()} {id(object())}")
        return await run(script, keys, *arguments)

    monkeypatch.setattr(signing.redis_cache, "run", run_after_the_attacker)
    action, assessment_id = await post(signing, **{"Idempotency-Key": "order-4"})
    assert action == "block"
    assert forgeries == {"idempotency_key": 3}
    async with signing.client() as http:
        assert (await http.get(f"{PATH}/{assessment_id}")).json()["action"] == "block"


@pytest.mark.parametrize("key", [None, SIGNING_KEY], ids=["no key", "key"])
async def test_large_entries_are_refused_unparsed(
    idle: GatewayBench, forgeries: Counter[str], monkeypatch: pytest.MonkeyPatch, key: SecretStr | None
) -> None:
    idle.configure(redis_signing_key=key)
    idle.guard.script = says_unsafe
    await idle.start()
    client = idle.redis_cache.client
    header = {"Idempotency-Key": "order-5"}
    _, first = await post(idle, **header)
    (claim_name,) = [name async for name in client.scan_iter(idle.redis_cache.key("gateway", "idempotency", "*"))]
    parsed: list[int] = []
    for model in (StoredAssessment, Claim):

        def note(body: bytes, parse: Callable[[bytes], object] = model.model_validate_json) -> object:
            parsed.append(len(body))
            return parse(body)

        monkeypatch.setattr(model, "model_validate_json", note)
    for name, size in ((claim_name, 5 << 10), (name_of(idle, first), 257 << 10), (name_of(idle, first), 8 << 20)):
        document = (await client.get(name)).removesuffix(b"}")
        await client.set(name, document + b',"x":[' + b"[]," * (size // 3) + b"0]}", keepttl=True)
    async with idle.client() as http:
        assert (await http.get(f"{PATH}/{first}")).status_code == 404
    assert max(parsed, default=0) < 4 << 10
    assert forgeries == {"assessment": 1}
    action, second = await post(idle, **header)
    assert (action, second != first) == ("block", True)
    assert max(parsed, default=0) < 4 << 10
    assert forgeries == {"assessment": 1, "idempotency_key": 1}
    assert await post(idle, **header) == ("block", second), "the new claim holds"


@pytest.mark.parametrize("late_s", [30, 172_800])
async def test_entries_that_are_written_again_after_their_end_are_absent(
    signing: GatewayBench, forgeries: Counter[str], monkeypatch: pytest.MonkeyPatch, late_s: int
) -> None:
    """The attacker kept the signed claim and the result of an image that is another one by now."""
    client = signing.redis_cache.client
    header = {"Idempotency-Key": "cat.jpg"}
    signing.guard.script = says_safe
    action, first = await post(signing, **header)
    assert action == "allow"
    assert await post(signing, **header) == ("allow", first), "the claim holds until its end"
    kept = {
        name: await client.get(name)
        for kind in ("assessment", "idempotency")
        async for name in client.scan_iter(signing.redis_cache.key("gateway", kind, "*"))
    }
    assert len(kept) == 2
    later_s = signing.settings.gateway_keep_s + late_s
    monkeypatch.setattr(assessment_store, "time", SimpleNamespace(time=lambda: time.time() + later_s))
    signing.guard.script = says_unsafe
    await client.mset(kept)
    async with signing.client() as http:
        assert (await http.get(f"{PATH}/{first}")).status_code == 404
    action, second = await post(signing, **header)
    assert (action, second != first) == ("block", True)
    is_counted = late_s > 60  # a shorter time may be a difference between clocks
    assert forgeries == ({"assessment": 1, "idempotency_key": 1} if is_counted else {})
    assert await post(signing, **header) == ("block", second), "the new claim holds"
