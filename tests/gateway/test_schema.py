"""The OpenAPI document: it describes each operation, and no request, valid or invalid, makes the gateway fail."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator

from services.gateway.problems import PROBLEM_KINDS, TYPE_PREFIX
from tests.support.gateway_bench import GatewayBench

EXAMPLES = 8
OPERATION_IDS = {
    ("POST", "/v1/moderations"): "moderate_v1_moderations_post",
    ("POST", "/v1/assessments"): "assess_v1_assessments_post",
    ("GET", "/v1/assessments/{assessment_id}"): "look_v1_assessments__assessment_id__get",
    ("GET", "/v1/policies"): "list__v1_policies_get",
    ("POST", "/v1/policies"): "publish_v1_policies_post",
    ("GET", "/v1/policies/{reference}"): "show_v1_policies__reference__get",
    ("GET", "/v1/policies/{name}/history"): "history_v1_policies__name__history_get",
    ("POST", "/v1/policies/{name}/activate"): "activate_v1_policies__name__activate_post",
    ("POST", "/v1/policies/{name}/rollback"): "rollback_v1_policies__name__rollback_post",
    ("GET", "/healthz"): "healthz_healthz_get",
    ("GET", "/readyz"): "readyz_readyz_get",
}
SCHEMAS = {
    *("Activation", "AppliedCalibration", "Assessment", "AssessmentForm", "AssessmentRequest", "HistoryEntry"),
    *("ImageFacts", "ImageInput", "ImageUrl", "ModelIdentity", "ModerationRequest", "ModerationResponse"),
    *("ModerationResult", "PolicyIdentity", "PolicySummary", "PolicyVersion", "Published", "Rollback", "Timings"),
    "Verdict",
}


async def test_requests_of_schemathesis_get_no_5xx(idle: GatewayBench) -> None:
    idle.configure(gateway_rate_per_s=100_000, gateway_body_deadline_s=10)
    server = await idle.serve()
    base, token = f"http://127.0.0.1:{server.port}", idle.token("admin")
    async with httpx.AsyncClient(base_url=base) as client:
        document = (await client.get("/openapi.json")).json()
        await idle.app.state.readiness.refresh()
        assert idle.app.state.readiness.not_ready_reason == ""
        assert (await client.get("/readyz")).status_code == 200
    schema = schemathesis.openapi.from_dict(document)
    seen: list[tuple[str, int]] = []
    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, _fuzz, schema, base, token, seen)
    assert len(seen) > EXAMPLES * len(OPERATION_IDS) / 3


def _fuzz(schema: Any, base: str, token: str, seen: list[tuple[str, int]]) -> None:
    """Send valid and invalid requests to each operation."""
    headers = {"Authorization": f"Bearer {token}"}

    def send(case: Any) -> None:
        response = case.call(base_url=base, headers=headers, timeout=30)
        seen.append((case.operation.label, response.status_code))
        assert response.status_code < 500, f"{case.operation.label}: {response.content[:300]!r}"

    bounded = settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            # An operation without parameters and body has no invalid requests.
            with suppress(Unsatisfiable):
                bounded(given(operation.as_strategy(generation_mode=mode))(send))()


async def test_openapi_names_of_operations_and_schemas_never_change(bench: GatewayBench) -> None:
    async with bench.client() as client:
        document = (await client.get("/openapi.json")).json()
    operation_ids = {
        (method.upper(), path): operation["operationId"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert operation_ids == OPERATION_IDS
    schemas = document["components"]["schemas"]
    assert {name: schema["title"] for name, schema in schemas.items()} == {name: name for name in SCHEMAS}


async def test_openapi_examples_are_valid(bench: GatewayBench) -> None:
    async with bench.client() as client:
        document = (await client.get("/openapi.json")).json()
    examples = 0
    for item in document["paths"].values():
        for operation in item.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                schema = media["schema"]
                whole = {**document, **schema} if "$ref" in schema else schema
                named = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], {})
                for example in named.get("examples", []):
                    Draft202012Validator(whole).validate(example)
                    examples += 1
    assert examples >= 4


def test_problem_kinds_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    for name, kind in PROBLEM_KINDS.items():
        assert f"| `{name}` | {kind.status} | {kind.title} |" in text, name
    assert TYPE_PREFIX in text
