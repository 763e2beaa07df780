"""OpenAI's moderation endpoint: OpenAI's client over a real connection, and refused requests."""

import hashlib
from typing import Any

import openai
import pytest

from services.core.errors import GuardFailed, UnreadableAnswer
from services.core.values import CATEGORIES, Assessment, Detail, PreparedImage
from tests.support.fake_guard import MODEL, says_safe
from tests.support.gateway_bench import OTHER_JPEG, GatewayBench, data_url, unsafe


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


async def knows_violence(image: PreparedImage, detail: Detail) -> Assessment:
    violent = hashlib.sha256(OTHER_JPEG).hexdigest()
    return unsafe() if image.sha256 == violent else await says_safe(image, detail)


async def test_openai_client_gets_verdicts_and_errors(idle: GatewayBench) -> None:
    server = await idle.serve()
    idle.guard.script = knows_violence
    uri = idle.put("moderations/a.jpg", OTHER_JPEG)
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key=idle.token(), max_retries=0
    ) as client:
        answer = await client.moderations.create(
            model="any-name", input=[part(data_url()), part(uri), part(data_url(OTHER_JPEG))]
        )
        assert answer.id.startswith("modr-")
        assert answer.model == MODEL.name
        assert [result.flagged for result in answer.results] == [False, True, True], (
            "results are in the order of the input"
        )
        violent = answer.results[1].model_dump()
        # The client keeps categories that OpenAI does not have. OpenAI's own categories are None.
        assert violent["categories"][CATEGORIES[1]] is True
        assert violent["category_scores"][CATEGORIES[1]] == pytest.approx(0.9)
        assert violent["category_applied_input_types"][CATEGORIES[1]] == ["image"]
        assert {name for name, value in violent["categories"].items() if value is not None} == set(CATEGORIES)
        own = {name: violent[name] for name in ("rating", "category", "rationale", "score", "action", "effort")}
        assert own == {
            "rating": "Unsafe",
            "category": CATEGORIES[1],
            "rationale": "a fight",
            "score": 0.9,
            "action": "block",
            "effort": "full",
        }
        assert (violent["policy"]["name"], violent["model"]["name"]) == ("default", "scripted")
        single = await client.moderations.create(input=[part(data_url())])
        assert [result.flagged for result in single.results] == [False]

        with pytest.raises(openai.BadRequestError) as text:
            await client.moderations.create(model="m", input="is this bad?")
        assert text.value.body == {
            "message": "Sluice does not judge text; send images as parts of type image_url",
            "type": "invalid_request_error",
            "param": "input",
            "code": "invalid",
        }
        unknown_key = client.with_options(api_key="sk-sluice-" + "0" * 16 + "-" + "x" * 43)
        with pytest.raises(openai.AuthenticationError) as rejected:
            await unknown_key.moderations.create(model="m", input=[part(data_url(OTHER_JPEG + b"\0" * 500_000))])
        assert rejected.value.code == "invalid_api_key"


REFUSED: list[tuple[Any, str | None, str]] = [
    ({"input": [part("data:image/png;base64,AAAA")]}, "input[0].image_url.url", "not_an_image"),
    ({"input": [part(data_url()), part("s3://uploads/absent")]}, "input[1].image_url.url", "image_not_found"),
    ({"input": part("s3://elsewhere/a")}, "input.image_url.url", "image_forbidden"),
    ({"input": [part("https://example.com/a.jpg")]}, "input[0].image_url.url", "url_refused"),
    ({"input": [part("http://127.0.0.1/a.jpg")]}, "input[0].image_url.url", "url_refused"),
    ({"input": [part("file:///etc/passwd")]}, "input[0].image_url.url", "invalid"),
    ({"input": [part("data:text/html;base64,AAAA")]}, "input[0].image_url.url", "invalid"),
    ({"input": [part("data:image/png;base64,A!")]}, "input[0].image_url.url", "invalid"),
    ({"input": [part("data:image/png,abc")]}, "input[0].image_url.url", "invalid"),
    ({"input": [part("s3://uploads")]}, "input[0].image_url.url", "invalid"),
    ({"input": ["a", "b"]}, "input[0]", "invalid"),
    ({"input": [part(data_url()), {"type": "text", "text": "a"}]}, "input[1]", "invalid"),
    ({"input": []}, "input", "invalid"),
    ({"input": None}, "input", "invalid"),
    ({}, "input", "invalid"),
    ({"input": [{"type": "image_url"}]}, "input[0].image_url", "invalid"),
    ({"input": [part(data_url())], "policy": "absent"}, "policy", "unknown_policy"),
    ({"input": [part(data_url())], "model": 7}, "model", "invalid"),
    ([], None, "invalid"),
    ("input", None, "invalid"),
]


async def test_invalid_input_is_a_400_that_names_the_field(bench: GatewayBench) -> None:
    async with bench.client() as client:
        for given, param, code in REFUSED:
            answer = await client.post("/v1/moderations", json=given)
            assert answer.status_code == 400, f"{given}: {answer.text}"
            assert answer.headers["content-type"] == "application/json"
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            found = (error["type"], error["param"], error["code"])
            assert found == ("invalid_request_error", param, code), given
    assert bench.guard.calls.count("verdict") <= 2, "refused requests are not judged"


async def test_errors_of_all_kinds_are_openai_error_objects(bench: GatewayBench) -> None:
    async with bench.client() as client:
        body = await client.post("/v1/moderations", content=b"{", headers={"content-type": "application/json"})
        kind = await client.post("/v1/moderations", content=b"a", headers={"content-type": "text/plain"})
        method = await client.get("/v1/moderations")
        bench.guard.script = _fails
        fault = await client.post("/v1/moderations", json={"input": part(data_url())})
        bench.guard.script = _refuses
        refused = await client.post("/v1/moderations", json={"input": part(data_url())})
    answers = {"malformed": body, "unsupported_media_type": kind, "method_not_allowed": method, "internal": fault}
    assert {code: answer.json()["error"]["code"] for code, answer in answers.items()} == {
        code: code for code in answers
    }
    assert [answer.status_code for answer in answers.values()] == [400, 415, 405, 500]
    assert fault.json()["error"]["type"] == "server_error"
    assert "secret" not in fault.text
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image_refused")


async def test_unreadable_answer_of_the_guard_is_flagged_for_review(bench: GatewayBench) -> None:
    bench.guard.script = _answers_unreadably
    async with bench.client() as client:
        (result,) = (await client.post("/v1/moderations", json={"input": part(data_url())})).json()["results"]
    assert (result["flagged"], result["outcome"], result["action"]) == (True, "needs_review", "review")
    assert not any(result["categories"].values())


async def test_categories_of_the_policy_are_in_the_result(bench: GatewayBench) -> None:
    document = b"name: shop\nown_categories: [{code: O10, title: Gambling, should_not: [Show bets.]}]\n"
    async with bench.client("admin") as client:
        assert (await client.post("/v1/policies", content=document)).status_code == 201
        request = {"input": part(data_url()), "policy": "shop@1"}
        (result,) = (await client.post("/v1/moderations", json=request)).json()["results"]
    assert list(result["categories"]) == [*CATEGORIES, "O10: Gambling"]
    assert result["policy"]["name"] == "shop"


async def _fails(_image: PreparedImage, _detail: Detail) -> Assessment:
    raise ZeroDivisionError("secret")


async def _refuses(_image: PreparedImage, _detail: Detail) -> Assessment:
    raise GuardFailed("The engine refuses it.")


async def _answers_unreadably(_image: PreparedImage, _detail: Detail) -> Assessment:
    raise UnreadableAnswer("what?", MODEL)
