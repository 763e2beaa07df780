"""The FastAPI application of the gateway, made of what it is given."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core import telemetry
from services.core.errors import SluiceError
from services.core.settings import Settings
from services.gateway.admission import Admission
from services.gateway.api_keys import ApiKeyCache, ApiKeyRegistry
from services.gateway.assessment_store import AssessmentStore
from services.gateway.auth import Authenticator
from services.gateway.load_shedding import LoadShedder
from services.gateway.problems import MEDIA_TYPE, HttpProblem, problem_of
from services.gateway.rate_limits import RateLimiter
from services.gateway.request_bodies import BodyMemory, BodyReader, DrainUnreadBodyMiddleware
from services.gateway.routes import assessments, health, moderations, policies
from services.gateway.url_fetch import ImageDownloader
from services.moderation.moderator import Moderator
from services.moderation.ports import GuardClient, ImagePreparer
from services.policies.cache import PolicyCache
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.service import PolicyService

_BODIES: Final[tuple[type[BaseModel], ...]] = (
    moderations.ModerationRequest,
    assessments.AssessmentRequest,
    assessments.AssessmentForm,
    policies.Activation,
    policies.Rollback,
)


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


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the gateway is made of; none of it is started or ended by the gateway."""

    moderator: Moderator
    guard: GuardClient
    preparer: ImagePreparer
    policies: PolicyCache
    registry: PolicyRegistry
    redis_cache: PolicyRedisCache
    keys: ApiKeyRegistry


def create_app(parts: Dependencies, settings: Settings) -> FastAPI:
    """The application. Its lifespan begins and ends what it does in the background."""
    keys = ApiKeyCache(parts.keys, refresh_s=settings.gateway_keys_refresh_s)
    shedder = LoadShedder(parts.moderator, settings)
    admission = Admission(
        RateLimiter(parts.redis_cache, settings), BodyMemory(settings.gateway_body_memory_bytes), shedder
    )
    authenticator, body_reader = Authenticator(keys, admission), BodyReader(settings)
    store = AssessmentStore(parts.redis_cache, keep_s=settings.gateway_keep_s)
    jobs = assessments.Assessments(store)
    downloader = ImageDownloader(
        settings.gateway_fetch_hosts,
        limit_bytes=min(settings.image_limit_bytes, settings.gateway_body_limit_bytes),
        deadline_s=settings.fetch_deadline_s,
    )
    readiness = health.Readiness(policies=parts.policies, preparer=parts.preparer, guard=parts.guard, keys=keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            for each in (keys, store, readiness):
                await running.enter_async_context(each)
            running.push_async_callback(jobs.drain, settings.drain_s)
            yield

    app = FastAPI(
        title="Sluice",
        description="Moderation of images by LlavaGuard, by versioned policies. Keys come from `sluice keys create`.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.include_router(
        moderations.router(authenticator, body_reader, downloader, parts.policies), responses=_OPENAI_ERRORS
    )
    service = PolicyService(
        parts.registry, parts.redis_cache, policies=parts.policies, refresh_s=settings.policy_refresh_s
    )
    work = policies.PolicyRoutes(parts.registry, service)
    for routes in (
        assessments.router(authenticator, body_reader, jobs, store, downloader),
        policies.router(authenticator, body_reader, work),
        health.router(readiness),
    ):
        app.include_router(routes, responses=_PROBLEMS)
    app.add_middleware(RequestMetricsMiddleware)
    app.add_middleware(DrainUnreadBodyMiddleware, settings=settings)
    for kind in (SluiceError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.state.readiness, app.state.load_shedder = readiness, shedder
    app.openapi = _openapi(app)  # type: ignore[method-assign]
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    problem = _problem(error)
    return problem.openai_response() if request.url.path == moderations.PATH else problem.response()


def _problem(error: Exception) -> HttpProblem:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = str(first["loc"][-1]) if first.get("loc") else "the request"
        return HttpProblem("invalid", f"{field}: {first['msg']}", param=field)
    if isinstance(error, HTTPException):
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "malformed")
        return HttpProblem(kind, str(error.detail))
    return problem_of(error)


class RequestMetricsMiddleware:
    """ASGI middleware: requests by route and status, and how long they took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            telemetry.GATEWAY_REQUESTS.inc(1, {"route": route, "status": str(status)})
            telemetry.GATEWAY_SECONDS.observe(time.perf_counter() - began, {"route": route})


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The document, with the bodies that the routes read by themselves."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema(
                [(model, "validation") for model in _BODIES], ref_template="#/components/schemas/{model}"
            )
            made.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
            app.openapi_schema = made
        return app.openapi_schema

    return document


def _errors(model: type[BaseModel], media_type: str) -> dict[int | str, dict[str, Any]]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    content = {media_type: {"schema": schema}}
    return {
        "4XX": {"description": "The request is refused; the body says why", "content": content},
        "5XX": {"description": "It cannot be answered now", "content": content},
    }


_PROBLEMS: Final = _errors(ProblemDocument, MEDIA_TYPE)
_OPENAI_ERRORS: Final = _errors(OpenAIError, "application/json")
