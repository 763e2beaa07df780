"""/v1/policies: what `sluice policy` does, over HTTP. Reading takes the role review, changing the role admin."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from services.core.errors import ConfigurationError, InvalidDocument, UnknownPolicy
from services.gateway.admission import AdmittedRequest
from services.gateway.auth import Authenticator
from services.gateway.problems import HttpProblem, invalid_field
from services.gateway.request_bodies import BodyReader, decoded
from services.policies.document_yaml import read_document, warnings
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry, PolicySummary, StoredVersion
from services.policies.rollout import Change
from services.policies.service import PolicyService

PATH: Final = "/v1/policies"
_LARGEST_VERSION: Final = 99_999_999
_EXAMPLE: Final = {"name": "shop", "categories": {"O6": "waive"}, "thresholds": {"review": 0.4, "block": 0.8}}

log = logging.getLogger(__name__)


class PolicyVersion(BaseModel):
    """One version."""

    name: str
    version: int
    digest: str
    document: dict[str, Any]


class Published(BaseModel):
    """A version that was just published; it is not active yet."""

    name: str
    version: int
    digest: str
    warnings: list[str]


class Activation(BaseModel):
    """Which version to make active, and why."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"version": 1, "why": "figures are good"}]}
    )

    version: Annotated[int, Field(ge=1, le=_LARGEST_VERSION)]
    why: Annotated[str, Field(max_length=2000)] = ""


class Rollback(BaseModel):
    """Why to go back."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"why": "the phone does not stop"}]})

    why: Annotated[str, Field(max_length=2000)] = ""


class HistoryEntry(BaseModel):
    """One change of a roll-out."""

    name: str
    number: int
    action: str
    from_: Annotated[int | None, Field(alias="from")]
    to: int | None
    who: str
    why: str
    at: str


class PolicyRoutes:
    """What the routes do: reads from the registry in threads, and changes by the policy service."""

    def __init__(self, registry: PolicyRegistry, service: PolicyService) -> None:
        self._registry = registry
        self.service = service

    async def summaries(self) -> list[PolicySummary]:
        names = await asyncio.to_thread(self._registry.names)
        return list(await asyncio.gather(*(asyncio.to_thread(self._registry.summary, name) for name in names)))

    async def version(self, reference: str) -> StoredVersion:
        """
        Raises:
            UnknownPolicy: there is no such version, or none is active.
        """
        return await asyncio.to_thread(self._registry.find, PolicyReference.parse(reference))

    async def publish(self, data: bytes) -> tuple[StoredVersion, list[str]]:
        """
        Raises:
            HttpProblem: the document is wrong; all that is wrong with it is named.
        """
        try:
            document = await asyncio.to_thread(read_document, data, "document")
        except InvalidDocument as error:
            problems = [
                {"line": each.line, "column": each.column, "field": each.field, "message": each.message}
                for each in error.issues
            ]
            raise HttpProblem("bad-policy", str(error), problems=problems) from None
        return await self.service.publish(document), warnings(document)

    async def change(self, change: Awaitable[Change]) -> Change:
        """Wait for a change of a roll-out.

        Raises:
            HttpProblem: the roll-out does not allow it.
        """
        try:
            return await change
        except ConfigurationError as error:
            raise HttpProblem("policy-conflict", str(error)) from None

    async def history(self, name: str) -> list[Change]:
        return await asyncio.to_thread(self._registry.history, name)


def router(authenticator: Authenticator, body_reader: BodyReader, work: PolicyRoutes) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["policies"], prefix=PATH)
    Reviewer = Annotated[AdmittedRequest, Depends(authenticator.require("review"))]  # noqa: N806
    Admin = Annotated[AdmittedRequest, Depends(authenticator.require("admin"))]  # noqa: N806

    @routes.get("", response_model=list[PolicySummary], summary="List the policies")
    async def list_(_: Reviewer) -> Response:
        return _json(await _absent_is_404(work.summaries()))

    @routes.post(
        "",
        status_code=201,
        response_model=Published,
        summary="Publish a document, in YAML or JSON, as the next version of its name",
        openapi_extra={"requestBody": {"required": True, "content": _documents()}},
    )
    async def publish(request: Request, admitted: Admin) -> Response:
        stored, warned = await work.publish(await body_reader.read(request, admitted.memory))
        log.info("%s published %s@%d", admitted.key.name, stored.name, stored.version)
        answer = {"name": stored.name, "version": stored.version, "digest": stored.digest, "warnings": warned}
        return _json(answer, 201, {"Location": f"{PATH}/{stored.name}@{stored.version}"})

    @routes.get("/{reference}", response_model=PolicyVersion, summary="Show NAME@V, or the active version of NAME")
    async def show(reference: str, _: Reviewer) -> Response:
        stored = await _absent_is_404(work.version(reference))
        document = stored.document.model_dump(mode="json", exclude_defaults=True)
        return _json({"name": stored.name, "version": stored.version, "digest": stored.digest, "document": document})

    @routes.get(
        "/{name}/history", response_model=list[HistoryEntry], summary="Every change of a roll-out, oldest first"
    )
    async def history(name: str, _: Reviewer) -> Response:
        return _json([_entry(change) for change in await _absent_is_404(work.history(name))])

    @routes.post(
        "/{name}/activate",
        response_model=HistoryEntry,
        summary="Make a version the one that new submissions get",
        openapi_extra=_body(Activation),
    )
    async def activate(name: str, request: Request, admitted: Admin) -> Response:
        wanted = _parsed(Activation, await body_reader.json(request, admitted.memory))
        change = work.change(work.service.activate(name, wanted.version, who=admitted.key.name, why=wanted.why))
        return _json(_entry(await _absent_is_404(change)))

    @routes.post(
        "/{name}/rollback",
        response_model=HistoryEntry,
        summary="Make the version active that was before the present one",
        openapi_extra=_body(Rollback, required=False),
    )
    async def rollback(name: str, request: Request, admitted: Admin) -> Response:
        body = await body_reader.read(request, admitted.memory)
        wanted = _parsed(Rollback, decoded(body) if body else {})
        change = work.change(work.service.rollback(name, who=admitted.key.name, why=wanted.why))
        return _json(_entry(await _absent_is_404(change)))

    return routes


async def _absent_is_404(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except UnknownPolicy as error:
        raise HttpProblem("not-found", str(error)) from None
    except ConfigurationError as error:
        raise HttpProblem("unavailable", str(error)) from None


def _parsed(model: type[Any], document: Any) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_field(error) from None


def _entry(change: Change) -> dict[str, Any]:
    return change.model_dump(mode="json", by_alias=True, exclude={"rollout"})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")


def _body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def _documents() -> dict[str, Any]:
    return {
        "application/yaml": {"schema": {"type": "string"}, "example": "name: shop\ncategories: {O6: waive}\n"},
        "application/json": {"schema": {"type": "object"}, "example": _EXAMPLE},
    }
