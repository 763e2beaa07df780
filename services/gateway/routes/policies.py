"""The routes of /v1/policies: `sluice policy` over HTTP. Reading needs the role review, changing the role admin."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_json

from services.core.errors import ConfigurationError, InvalidDocument, UnknownPolicy
from services.core.text import require_one_line
from services.gateway.admission import AdmittedRequest
from services.gateway.auth import Authenticator
from services.gateway.openapi import describe_body, describe_json_body
from services.gateway.policy_access import PolicyAccess
from services.gateway.problems import HttpProblem, parse_body
from services.gateway.request_bodies import BodyReader
from services.policies.document_warnings import find_warnings
from services.policies.document_yaml import read_document
from services.policies.reference import PolicyReference
from services.policies.registry import MAX_VERSION, PolicyRegistry, PolicySummary
from services.policies.rollout import RolloutChange
from services.policies.service import PolicyService
from services.policies.tenants import Document

PATH: Final = "/v1/policies"
_EXAMPLE: Final = {"name": "shop", "categories": {"O6": "waive"}, "thresholds": {"review": 0.4, "block": 0.8}}
_DOCUMENT_CONTENT: Final = {
    "application/yaml": {"schema": {"type": "string"}, "example": "name: shop\ncategories: {O6: waive}\n"},
    "application/json": {"schema": {"type": "object"}, "example": _EXAMPLE},
}

log = logging.getLogger(__name__)
T = TypeVar("T")
Reason = Annotated[str, Field(max_length=2000), AfterValidator(require_one_line)]


class PolicyVersion(BaseModel):
    """One version of a policy."""

    name: str
    version: int
    digest: str
    document: dict[str, Any]


class Published(BaseModel):
    """A version that was published now. It is not active yet."""

    name: str
    version: int
    digest: str
    warnings: list[str]


class Activation(BaseModel):
    """The version to activate, and the reason."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"version": 1, "why": "evaluation passed"}]}
    )

    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    why: Reason = ""


class Rollback(BaseModel):
    """The reason for a rollback."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"why": "too many images are blocked"}]})

    why: Reason = ""


class HistoryEntry(BaseModel):
    """One change of a policy's rollout."""

    name: str
    number: int
    action: str
    from_: Annotated[int | None, Field(alias="from")]
    to: int | None
    who: str
    why: str
    at: str


def build_router(
    authenticator: Authenticator,
    body_reader: BodyReader,
    registry: PolicyRegistry,
    service: PolicyService,
    access: PolicyAccess,
) -> APIRouter:
    """Build the routes. They read from `registry`, and change policies by `service`, as far as `access` allows."""
    routes = APIRouter(tags=["policies"], prefix=PATH)
    Reviewer = Annotated[AdmittedRequest, Depends(authenticator.require("review"))]  # noqa: N806
    Admin = Annotated[AdmittedRequest, Depends(authenticator.require("admin"))]  # noqa: N806

    @routes.get("", response_model=list[PolicySummary], summary="List the policies")
    async def list_(admitted: Reviewer) -> Response:
        names = await _map_registry_errors(asyncio.to_thread(registry.list_names))
        readable = [name for name in names if await access.may_read(admitted, name)]
        return _respond(await _map_registry_errors(_read_summaries(registry, readable)))

    @routes.post(
        "",
        status_code=201,
        response_model=Published,
        summary="Publish a document in YAML or JSON as the next version of its policy",
        openapi_extra=describe_body(_DOCUMENT_CONTENT),
    )
    async def publish(request: Request, admitted: Admin) -> Response:
        document = await _read_document(await body_reader.read(request, admitted.memory))
        if not await access.may_read(admitted, document.name):
            raise HttpProblem("not-permitted", f"this API key may not publish versions of {document.name!r}")
        await access.require_changeable(admitted, document.name)
        stored = await service.publish(document)
        log.info("the API key %r published %s@%d", admitted.api_key.name, stored.name, stored.version)
        body = {
            "name": stored.name,
            "version": stored.version,
            "digest": stored.digest,
            "warnings": find_warnings(document),
        }
        return _respond(body, 201, {"Location": f"{PATH}/{stored.name}@{stored.version}"})

    @routes.get(
        "/{reference}", response_model=PolicyVersion, summary="Get the version NAME@V, or the active version of NAME"
    )
    async def show(reference: str, admitted: Reviewer) -> Response:
        parsed = _parse_reference(reference)
        await access.require_readable(admitted, parsed.name)
        stored = await _map_registry_errors(asyncio.to_thread(registry.find, parsed))
        document = stored.document.model_dump(mode="json", exclude_defaults=True)
        return _respond({"name": stored.name, "version": stored.version, "digest": stored.digest, "document": document})

    @routes.get(
        "/{name}/history",
        response_model=list[HistoryEntry],
        summary="List all changes of a policy's rollout, oldest first",
    )
    async def history(name: str, admitted: Reviewer) -> Response:
        await access.require_readable(admitted, name)
        changes = await _map_registry_errors(asyncio.to_thread(registry.list_changes, name))
        return _respond([_to_entry(change) for change in changes])

    @routes.post(
        "/{name}/activate",
        response_model=HistoryEntry,
        summary="Activate a version: new submissions are judged by it",
        openapi_extra=describe_json_body(Activation),
    )
    async def activate(name: str, request: Request, admitted: Admin) -> Response:
        wanted = parse_body(Activation, await body_reader.read_json(request, admitted.memory))
        await access.require_changeable(admitted, name)
        change = service.activate(name, wanted.version, who=admitted.api_key.name, why=wanted.why)
        return _respond(_to_entry(await _map_registry_errors(_map_conflict(change))))

    @routes.post(
        "/{name}/rollback",
        response_model=HistoryEntry,
        summary="Activate the version that was active before",
        openapi_extra=describe_json_body(Rollback, required=False),
    )
    async def rollback(name: str, request: Request, admitted: Admin) -> Response:
        wanted = parse_body(Rollback, await body_reader.read_any_json(request, admitted.memory, if_empty={}))
        await access.require_changeable(admitted, name)
        change = service.rollback(name, who=admitted.api_key.name, why=wanted.why)
        return _respond(_to_entry(await _map_registry_errors(_map_conflict(change))))

    return routes


async def _read_summaries(registry: PolicyRegistry, names: Sequence[str]) -> list[PolicySummary]:
    return list(await asyncio.gather(*(asyncio.to_thread(registry.summarize, name) for name in names)))


def _parse_reference(reference: str) -> PolicyReference:
    """
    Raises:
        HttpProblem: the text is not NAME or NAME@V.
    """
    try:
        return PolicyReference.parse(reference)
    except UnknownPolicy as error:
        raise HttpProblem("not-found", str(error)) from None


async def _read_document(data: bytes) -> Document:
    """
    Raises:
        HttpProblem: the document is invalid. The problem lists all its mistakes.
    """
    try:
        return await asyncio.to_thread(read_document, data, "document")
    except InvalidDocument as error:
        problems = [
            {"line": each.line, "column": each.column, "field": each.field, "message": each.message}
            for each in error.issues
        ]
        raise HttpProblem("bad-policy", str(error), problems=problems) from None


async def _map_conflict(work: Awaitable[RolloutChange]) -> RolloutChange:
    """Wait for a change of a rollout.

    Raises:
        HttpProblem: the rollout does not allow the change.
    """
    # For a change, ConfigurationError means that the rollout does not allow it; for a read, that there is no bucket.
    try:
        return await work
    except ConfigurationError as error:
        raise HttpProblem("policy-conflict", str(error)) from None


async def _map_registry_errors(work: Awaitable[T]) -> T:
    """Wait for the registry or the service.

    Raises:
        HttpProblem: the policy does not exist, or the policy bucket cannot be used.
    """
    try:
        return await work
    except UnknownPolicy as error:
        raise HttpProblem("not-found", str(error)) from None
    except ConfigurationError as error:
        raise HttpProblem("unavailable", str(error)) from None


def _to_entry(change: RolloutChange) -> dict[str, Any]:
    return change.model_dump(mode="json", by_alias=True, exclude={"rollout"})


def _respond(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")
