"""The routes of /v1/assessments: judge one image. The response is a verdict, as on the verdicts stream."""

import asyncio
import re
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from services.core.messages import Verdict
from services.gateway.admission import AdmittedRequest
from services.gateway.assessment_jobs import AssessmentJobs
from services.gateway.assessment_store import AssessmentStore, StoredAssessment
from services.gateway.auth import Authenticator
from services.gateway.openapi import describe_body, refer_to
from services.gateway.problems import HttpProblem
from services.gateway.request_bodies import BodyReader
from services.gateway.routes.assessment_requests import AssessmentForm, AssessmentRequest, read_job
from services.gateway.url_fetch import ImageDownloader

PATH: Final = "/v1/assessments"
MAX_WAIT_S: Final = 300
_ID_PATTERN: Final = re.compile("[0-9a-f]{32}")

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=MAX_WAIT_S,
        description="seconds to wait for the verdict; if it is not there by then, the response is 202",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="requests with the same key and body are judged once"),
]


class AssessmentResource(BaseModel):
    """An assessment without a verdict: pending or failed."""

    __qualname__ = "Assessment"  # the name in the OpenAPI document, from which clients are generated
    model_config = ConfigDict(title="Assessment")

    id: str
    status: Literal["pending", "failed"]
    problem: dict[str, Any] | None = None


def build_router(
    authenticator: Authenticator,
    body_reader: BodyReader,
    jobs: AssessmentJobs,
    store: AssessmentStore,
    downloader: ImageDownloader,
) -> APIRouter:
    """Build the routes."""
    routes = APIRouter(tags=["assessments"])
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": Verdict, "description": "The verdict"},
        202: {"model": AssessmentResource, "description": "The image is not judged yet; ask again at `Location`"},
    }

    @routes.post(
        PATH,
        summary="Judge one image",
        responses=responses,
        openapi_extra=describe_body(
            {"application/json": refer_to(AssessmentRequest), "multipart/form-data": refer_to(AssessmentForm)}
        ),
    )
    async def assess(
        request: Request,
        admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))],
        wait: Wait = 0,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        pending = store.build_pending(admitted.api_key.tenant)
        job = await read_job(request, admitted, pending.id, body_reader, downloader)
        if idempotency_key is not None:
            claimed = await jobs.claim(f"{admitted.api_key.id}:{idempotency_key}", job, pending)
            if claimed != pending.id:
                return _respond(await jobs.wait_for_result(claimed, wait), claimed)
        elif not wait:
            await store.create(pending)
        task = await jobs.start(pending, job, admitted)
        if wait:
            await asyncio.wait([task], timeout=wait)
            if not task.done() and idempotency_key is None:
                await store.create(pending)
        return _respond(task.result() if task.done() else pending, pending.id)

    @routes.get(
        f"{PATH}/{{assessment_id}}",
        summary="Get an assessment",
        operation_id="look_v1_assessments__assessment_id__get",  # the name in 0.1.0, a method of generated clients
        responses=responses,
    )
    async def get_assessment(
        assessment_id: str,
        admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))],
        wait: Wait = 0,
    ) -> Response:
        stored = await jobs.wait_for_result(assessment_id, 0) if _ID_PATTERN.fullmatch(assessment_id) else None
        if stored is None or stored.tenant != admitted.api_key.tenant:
            raise HttpProblem("not-found", "the assessment does not exist or has expired")
        if stored.is_pending and wait:
            stored = await jobs.wait_for_result(assessment_id, wait)
        return _respond(stored, assessment_id)

    return routes


def _respond(stored: StoredAssessment | None, assessment_id: str) -> Response:
    location = {"Location": f"{PATH}/{assessment_id}"}
    if stored is not None and stored.problem is not None:
        raise HttpProblem.from_document(stored.problem)
    if stored is not None and stored.verdict is not None:
        body = stored.verdict.model_dump_json()
        return Response(body, 200, location, "application/json")
    body = to_json({"id": assessment_id, "status": "pending"}).decode()
    return Response(body, 202, location | {"Retry-After": "1"}, "application/json")
