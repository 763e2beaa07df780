"""The requests of /v1/assessments: their JSON and form bodies, and the jobs that they ask for."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from services.core.values import Detail
from services.gateway.admission import AdmittedRequest
from services.gateway.assessment_jobs import AssessmentJob
from services.gateway.problems import HttpProblem, parse_body
from services.gateway.request_bodies import BodyReader, decode_body_json, is_form
from services.gateway.submitted_images import RequestContext, SubmittedImage, from_s3, from_upload, from_url
from services.gateway.url_fetch import ImageDownloader


class AssessmentRequest(BaseModel):
    """One image by reference, and how to judge it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"uri": "s3://uploads/cat.jpg", "policy": "default", "detail": "verdict"}]},
    )

    uri: Annotated[str | None, Field(description="s3://bucket/key; or https://, if the settings allow the host")] = None
    version_id: Annotated[str | None, Field(max_length=1024)] = None
    etag: Annotated[str | None, Field(max_length=1024)] = None
    id: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="your own id; the verdict has it as `submission_id`"),
    ] = None
    policy: Annotated[
        str, Field(max_length=256, description="`name`, or `name@7` for one version; by default the tenant's policy")
    ] = "default"
    detail: Annotated[
        Detail,
        Field(
            description="with `score`, which costs one token, the verdict has no rationale, and no category other than "
            "`NA: None applying`"
        ),
    ] = "verdict"

    @model_validator(mode="after")
    def _check_version_fields(self) -> Self:
        if self.uri is None and (self.version_id or self.etag):
            raise ValueError("version_id and etag are only for objects in S3, not for uploads")
        return self


class AssessmentForm(BaseModel):
    """An upload: the image, and the fields of `AssessmentRequest`, as JSON in `request` or each as a form field."""

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    request: Annotated[str | None, Field(description="JSON: id, policy, detail")] = None
    id: str | None = None
    policy: str | None = None
    detail: Literal["score", "verdict"] | None = None


async def read_job(
    request: Request,
    admitted: AdmittedRequest,
    assessment_id: str,
    body_reader: BodyReader,
    downloader: ImageDownloader,
) -> AssessmentJob:
    """Read the body of a request. `assessment_id` is the submission's id, unless the client gives one.

    Raises:
        HttpProblem: the body cannot be read, a field is invalid, or an image at a URL cannot be fetched.
    """
    if is_form(request):
        form = await body_reader.read_form(request, admitted.memory)
        if form.file is None:
            raise HttpProblem("invalid", "the part `file` with the image is missing", param="file")
        wanted = parse_body(AssessmentRequest, _merge_fields(form.fields))
        if wanted.uri is not None:
            raise HttpProblem("invalid", "a request must have either `file` or `uri`, not both", param="uri")
        image = await from_upload(form.file, _build_context(admitted, assessment_id, wanted))
    else:
        wanted = parse_body(AssessmentRequest, await body_reader.read_json(request, admitted.memory))
        image = await _refer_to_image(wanted, _build_context(admitted, assessment_id, wanted), admitted, downloader)
    identity = [wanted.id, image.request.uri, wanted.version_id, wanted.etag, wanted.policy, wanted.detail]
    return AssessmentJob(image, wanted.detail, hashlib.sha256(to_json(identity)).hexdigest())


async def _refer_to_image(
    wanted: AssessmentRequest, context: RequestContext, admitted: AdmittedRequest, downloader: ImageDownloader
) -> SubmittedImage:
    if wanted.uri is None:
        raise HttpProblem("invalid", "`uri` is missing; set it, or send the image as multipart/form-data", param="uri")
    if wanted.uri.startswith("s3://"):
        return from_s3(wanted.uri, context, version_id=wanted.version_id, etag=wanted.etag)
    return await from_url(wanted.uri, context, downloader=downloader, lease=admitted.memory)


def _build_context(admitted: AdmittedRequest, assessment_id: str, wanted: AssessmentRequest) -> RequestContext:
    return RequestContext(admitted.api_key, wanted.id or assessment_id, wanted.policy)


def _merge_fields(fields: Mapping[str, str]) -> Any:
    """Return the fields of a form. Form fields override the same fields in the JSON of `request`."""
    nested = decode_body_json(fields["request"]) if "request" in fields else {}
    if not isinstance(nested, dict):
        raise HttpProblem("invalid", "the part `request` must be a JSON object", param="request")
    return nested | {name: value for name, value in fields.items() if name != "request"}
