"""/v1/assessments: one image, judged for who waits or asks again later. The answer is a verdict as on the stream."""

import asyncio
import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

from services.core.messages import Verdict
from services.core.tasks import cancel_and_wait
from services.core.values import Detail
from services.gateway.admission import AdmittedRequest
from services.gateway.assessment_store import AssessmentStore, StoredAssessment
from services.gateway.auth import Authenticator
from services.gateway.image_inputs import Image, RequestContext, from_s3, from_upload, from_url
from services.gateway.problems import HttpProblem, invalid_field, problem_of
from services.gateway.request_bodies import BodyReader, decoded, is_form
from services.gateway.url_fetch import ImageDownloader

PATH: Final = "/v1/assessments"
_TEMPORARY: Final = frozenset({429, 500, 503})
LONGEST_WAIT_S: Final = 300
_LOOK_S: Final = 0.1
_ID: Final = re.compile("[0-9a-f]{32}")

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=LONGEST_WAIT_S,
        description="seconds to wait for the verdict; where it is not there by then the answer is 202",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="requests with the same key and body are judged once"),
]


class AssessmentRequest(BaseModel):
    """One image by reference, and how to judge it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"uri": "s3://uploads/cat.jpg", "policy": "default", "detail": "verdict"}]},
    )

    uri: Annotated[str | None, Field(description="s3://bucket/key; or https:// where the settings allow the host")] = (
        None
    )
    version_id: Annotated[str | None, Field(max_length=1024)] = None
    etag: Annotated[str | None, Field(max_length=1024)] = None
    id: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="yours; it is the verdict's `submission_id`"),
    ] = None
    policy: Annotated[str, Field(max_length=256, description="`name`, or `name@7`; the tenant's unless given")] = (
        "default"
    )
    detail: Annotated[
        Detail, Field(description="score: one token; the verdict then has no category and no rationale")
    ] = "verdict"

    @model_validator(mode="after")
    def _pins_what_it_names(self) -> Self:
        if self.uri is None and (self.version_id or self.etag):
            raise ValueError("version_id and etag are of an object in S3; an upload has none")
        return self


class AssessmentForm(BaseModel):
    """An upload: the image, and the fields of `AssessmentRequest` as JSON, or each as a field of the form."""

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    request: Annotated[str | None, Field(description="JSON: id, policy, detail")] = None
    id: str | None = None
    policy: str | None = None
    detail: Literal["score", "verdict"] | None = None


class AssessmentResource(BaseModel):
    """An assessment that is not a verdict (yet)."""

    __qualname__ = "Assessment"  # the name in the OpenAPI document, from which clients are generated
    model_config = ConfigDict(title="Assessment")

    id: str
    status: Literal["pending", "failed"]
    problem: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _AssessmentJob:
    """One request to judge."""

    image: Image
    detail: Detail
    digest: str
    """Of everything that says what is judged and how."""


class Assessments:
    """Judges in jobs: tasks that may outlive their requests."""

    def __init__(self, store: AssessmentStore) -> None:
        self._store = store
        self._tasks: dict[str, asyncio.Task[StoredAssessment]] = {}

    async def start(
        self, pending: StoredAssessment, job: _AssessmentJob, admitted: AdmittedRequest
    ) -> asyncio.Task[StoredAssessment]:
        """Start to judge.

        Raises:
            HttpProblem: the API key has too many jobs at a time.
        """
        try:
            held = admitted.start_job()
        except HttpProblem as problem:
            # Other requests may know the pending assessment already; they must not wait for it.
            await self._store.finish(pending.failed(problem))
            raise
        held.enter_context(self._store.renewing(pending))
        task = asyncio.create_task(self._run(pending, job, admitted, held))
        self._tasks[pending.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(pending.id, None))
        return task

    async def wait_for_result(self, assessment_id: str, wait_s: float) -> StoredAssessment | None:
        """What is known of an assessment, here or in another process, at its end or after `wait_s` seconds."""
        deadline = asyncio.get_running_loop().time() + wait_s
        if task := self._tasks.get(assessment_id):
            await asyncio.wait([task], timeout=wait_s)
            if task.done():
                return task.result()
        while True:
            stored = await self._store.get(assessment_id)
            if stored is None or not stored.is_pending or asyncio.get_running_loop().time() >= deadline:
                return stored
            await asyncio.sleep(_LOOK_S)

    async def drain(self, within_s: float) -> None:
        """Finish what was begun; what takes longer is ended, and whoever asks for it hears that it was interrupted."""
        if tasks := list(self._tasks.values()):
            _, late = await asyncio.wait(tasks, timeout=within_s)
            await asyncio.gather(*map(cancel_and_wait, late))

    async def _run(
        self, pending: StoredAssessment, job: _AssessmentJob, admitted: AdmittedRequest, held: ExitStack
    ) -> StoredAssessment:
        with held:
            try:
                done = pending.done(await admitted.judge(job.image, job.detail))
            except Exception as error:  # noqa: BLE001 - any error is the result that clients ask for
                done = pending.failed(problem_of(error))
            await self._store.finish(done)
            return done


def router(
    authenticator: Authenticator,
    body_reader: BodyReader,
    assessments: Assessments,
    store: AssessmentStore,
    downloader: ImageDownloader,
) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["assessments"])
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": Verdict, "description": "The verdict"},
        202: {"model": AssessmentResource, "description": "Not judged yet; ask again at `Location`"},
    }

    @routes.post(
        PATH,
        summary="Judge one image",
        responses=answers,
        openapi_extra={"requestBody": {"required": True, "content": _content()}},
    )
    async def assess(
        request: Request,
        admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))],
        wait: Wait = 0,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        pending = store.pending(admitted.key.tenant)
        job = await _read_request(request, admitted, pending.id, body_reader, downloader)
        if idempotency_key is not None:
            claimed = await _claim(f"{admitted.key.id}:{idempotency_key}", job.digest, pending)
            if claimed != pending.id:
                return _answer(await assessments.wait_for_result(claimed, wait), claimed)
        elif not wait:
            await store.create(pending)
        task = await assessments.start(pending, job, admitted)
        if wait:
            await asyncio.wait([task], timeout=wait)
            if not task.done() and idempotency_key is None:
                await store.create(pending)
        return _answer(task.result() if task.done() else pending, pending.id)

    async def _claim(name: str, request: str, pending: StoredAssessment) -> str:
        """The id of an idempotency key's assessment: `pending`, or that of an earlier request with the key."""
        known = await store.claim(name, request, pending)
        if known.request != request:
            raise HttpProblem("idempotency-key-reused", "an earlier request with this idempotency key was different")
        if known.assessment != pending.id:
            stored = await store.get(known.assessment)
            # A temporary failure may be tried again, by one of the requests that find it.
            may_retry = stored is None or (stored.problem is not None and stored.problem["status"] in _TEMPORARY)
            if may_retry and await store.replace(name, known, pending):
                return pending.id
        return known.assessment

    @routes.get(
        f"{PATH}/{{assessment_id}}",
        summary="Ask for an assessment again",
        operation_id="look_v1_assessments__assessment_id__get",  # a method of generated clients
        responses=answers,
    )
    async def get_assessment(
        assessment_id: str,
        admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))],
        wait: Wait = 0,
    ) -> Response:
        stored = await assessments.wait_for_result(assessment_id, 0) if _ID.fullmatch(assessment_id) else None
        if stored is None or stored.tenant != admitted.key.tenant:
            raise HttpProblem("not-found", "there is no such assessment, or it was too long ago")
        if stored.is_pending and wait:
            stored = await assessments.wait_for_result(assessment_id, wait)
        return _answer(stored, assessment_id)

    return routes


def _answer(stored: StoredAssessment | None, assessment_id: str) -> Response:
    location = {"Location": f"{PATH}/{assessment_id}"}
    if stored is not None and stored.problem is not None:
        raise HttpProblem.of_document(stored.problem)
    if stored is not None and stored.verdict is not None:
        body = stored.verdict.model_dump_json()
        return Response(body, 200, location, "application/json")
    body = to_json({"id": assessment_id, "status": "pending"}).decode()
    return Response(body, 202, location | {"Retry-After": "1"}, "application/json")


async def _read_request(
    request: Request,
    admitted: AdmittedRequest,
    assessment_id: str,
    body_reader: BodyReader,
    downloader: ImageDownloader,
) -> _AssessmentJob:
    context = RequestContext(admitted.key, assessment_id)
    if is_form(request):
        form = await body_reader.form(request, admitted.memory)
        if form.file is None:
            raise HttpProblem("invalid", "the part `file` with the image is missing", param="file")
        wanted = _parsed(_fields(form.fields))
        if wanted.uri is not None:
            raise HttpProblem("invalid", "an upload has no uri: send one or the other", param="uri")
        image = await from_upload(form.file, _with_fields(context, wanted))
    else:
        wanted = _parsed(await body_reader.json(request, admitted.memory))
        if wanted.uri is None:
            raise HttpProblem("invalid", "uri is missing; or send the image as multipart/form-data", param="uri")
        if wanted.uri.startswith("s3://"):
            image = from_s3(wanted.uri, _with_fields(context, wanted), version_id=wanted.version_id, etag=wanted.etag)
        else:
            image = await from_url(
                wanted.uri, _with_fields(context, wanted), downloader=downloader, lease=admitted.memory
            )
    said = [wanted.id, image.request.uri, wanted.version_id, wanted.etag, wanted.policy, wanted.detail]
    return _AssessmentJob(image, wanted.detail, hashlib.sha256(to_json(said)).hexdigest())


def _with_fields(context: RequestContext, wanted: AssessmentRequest) -> RequestContext:
    return RequestContext(context.key, wanted.id or context.submission_id, wanted.policy)


def _fields(fields: Mapping[str, str]) -> Any:
    """The fields of a form: each by itself, over those in the JSON of `request`."""
    inside = decoded(fields["request"]) if "request" in fields else {}
    if not isinstance(inside, dict):
        raise HttpProblem("invalid", "the part `request` has to be a JSON object", param="request")
    return inside | {name: value for name, value in fields.items() if name != "request"}


def _parsed(document: Any) -> AssessmentRequest:
    try:
        return AssessmentRequest.model_validate(document)
    except ValidationError as error:
        raise invalid_field(error) from None


def _content() -> dict[str, Any]:
    return {
        "application/json": {"schema": {"$ref": "#/components/schemas/AssessmentRequest"}},
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/AssessmentForm"}},
    }
