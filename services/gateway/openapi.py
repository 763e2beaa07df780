"""The OpenAPI document: the parts that FastAPI cannot derive from the routes."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.problems import MEDIA_TYPE

_SCHEMA_REFERENCE: Final = "#/components/schemas/{model}"


class ProblemDocument(BaseModel):
    """RFC 9457. `type` is `urn:sluice:problem:` and a name that never changes."""

    type: str
    title: str
    status: int
    detail: str
    param: str | None = None


class OpenAIError(BaseModel):
    """OpenAI's error object."""

    error: dict[str, str | None]


def describe_errors(model: type[BaseModel], media_type: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route whose errors have this body."""
    schema = model.model_json_schema(ref_template=_SCHEMA_REFERENCE)
    content = {media_type: {"schema": schema}}
    return {
        "4XX": {"description": "The request is refused; the body says why", "content": content},
        "5XX": {"description": "The gateway cannot answer the request now", "content": content},
    }


def describe_json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads a JSON body by itself. `build_openapi` must get `model`, too."""
    return describe_body({"application/json": refer_to(model)}, required=required)


def describe_body(content: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads a body by itself. `content` is by media type."""
    return {"requestBody": {"required": required, "content": content}}


def refer_to(model: type[BaseModel]) -> dict[str, Any]:
    """Return the content of a body that has the schema of `model`."""
    return {"schema": {"$ref": _SCHEMA_REFERENCE.format(model=model.__name__)}}


def build_openapi(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> Callable[[], dict[str, Any]]:
    """Return a replacement for `app.openapi`. It adds the schemas of `bodies`, which routes read by themselves."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            built = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema([(model, "validation") for model in bodies], ref_template=_SCHEMA_REFERENCE)
            built.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
            app.openapi_schema = built
        return app.openapi_schema

    return document


PROBLEM_RESPONSES: Final = describe_errors(ProblemDocument, MEDIA_TYPE)
OPENAI_ERROR_RESPONSES: Final = describe_errors(OpenAIError, "application/json")
