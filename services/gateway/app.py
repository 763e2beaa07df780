"""The FastAPI application of the gateway."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from services.core.errors import SluiceError
from services.core.settings import Settings
from services.core.tenancy import Tenancy
from services.gateway.admission import Admission
from services.gateway.api_key_cache import MAX_UNKNOWN_KEYS, ApiKeyCache
from services.gateway.api_keys import ApiKeyRegistry
from services.gateway.assessment_jobs import AssessmentJobs
from services.gateway.assessment_store import AssessmentStore
from services.gateway.auth import Authenticator
from services.gateway.body_memory import BodyMemory
from services.gateway.connection_limits import IS_OVER_RATE
from services.gateway.load_shedding import BoundedModerator
from services.gateway.middleware import DiscardUnreadBodyMiddleware, RequestMetricsMiddleware
from services.gateway.openapi import OPENAI_ERROR_RESPONSES, PROBLEM_RESPONSES, build_openapi
from services.gateway.policy_access import PolicyAccess
from services.gateway.problems import HttpProblem, to_problem
from services.gateway.rate_limits import RateLimiter
from services.gateway.readiness import Readiness
from services.gateway.request_bodies import BodyReader
from services.gateway.routes import assessment_requests, assessments, health, moderation_bodies, moderations, policies
from services.gateway.url_fetch import ImageDownloader
from services.moderation.moderator import Moderator
from services.moderation.ports import GuardClient, ImagePreparer
from services.policies.cache import PolicyCache
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.service import PolicyService

_BODY_MODELS: Final[tuple[type[BaseModel], ...]] = (
    moderation_bodies.ModerationRequest,
    assessment_requests.AssessmentRequest,
    assessment_requests.AssessmentForm,
    policies.Activation,
    policies.Rollback,
)


@dataclass(frozen=True, slots=True)
class GatewayDependencies:
    """The parts that the gateway uses. It neither starts nor closes them."""

    moderator: Moderator
    guard: GuardClient
    preparer: ImagePreparer
    policies: PolicyCache
    registry: PolicyRegistry
    redis_cache: PolicyRedisCache
    keys: ApiKeyRegistry


def create_app(dependencies: GatewayDependencies, settings: Settings) -> FastAPI:
    """Build the application. Its lifespan starts and ends the background tasks of the gateway."""
    keys = ApiKeyCache(
        dependencies.keys,
        refresh_s=settings.gateway_keys_refresh_s,
        max_unknown_keys=max(1, min(MAX_UNKNOWN_KEYS, settings.gateway_connections // 8)),
    )
    moderator = BoundedModerator(dependencies.moderator, settings)
    tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
    limiter = RateLimiter(dependencies.redis_cache, settings)
    admission = Admission(
        limiter,
        BodyMemory(settings.gateway_body_memory_bytes),
        moderator,
        tenancy,
    )
    authenticator, body_reader = Authenticator(keys, admission), BodyReader(settings)
    redis_cache = dependencies.redis_cache
    store = AssessmentStore(redis_cache, redis_cache.signer, keep_s=settings.gateway_keep_s)
    jobs = AssessmentJobs(store)
    downloader = ImageDownloader(
        settings.gateway_fetch_hosts,
        limit_bytes=min(settings.image_limit_bytes, settings.gateway_body_limit_bytes),
        deadline_s=settings.fetch_deadline_s,
    )
    readiness = Readiness(
        policies=dependencies.policies,
        preparer=dependencies.preparer,
        guard=dependencies.guard,
        keys=keys,
        moderator=moderator,
    )

    def is_welcome(token: str) -> bool:
        api_key = keys.find_cached(token)
        return api_key is not None and not limiter.is_refusing(api_key)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            for each in (keys, store, readiness):
                await running.enter_async_context(each)
            running.push_async_callback(jobs.drain, settings.drain_s)
            yield

    app = _build_empty_app(lifespan, settings)
    app.include_router(
        moderations.build_router(authenticator, body_reader, downloader, dependencies.policies),
        responses=OPENAI_ERROR_RESPONSES,
    )
    service = PolicyService(
        dependencies.registry,
        dependencies.redis_cache,
        policies=dependencies.policies,
        refresh_s=settings.policy_refresh_s,
    )
    for routes in (
        assessments.build_router(authenticator, body_reader, jobs, store, downloader),
        policies.build_router(
            authenticator, body_reader, dependencies.registry, service, PolicyAccess(dependencies.policies, tenancy)
        ),
        health.build_router(readiness),
    ):
        app.include_router(routes, responses=PROBLEM_RESPONSES)
    app.state.is_welcome = is_welcome  # the server reads it
    # The Ray Serve deployment reads the readiness; tests use all three.
    app.state.readiness, app.state.api_keys, app.state.assessment_store = readiness, keys, store
    return app


def _build_empty_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]], settings: Settings) -> FastAPI:
    """Build an application without routes: its middleware, error responses and OpenAPI document."""
    app = FastAPI(
        title="Sluice",
        description="LlavaGuard judges images by versioned policies. `sluice keys create` makes API keys.",
        version="1",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(RequestMetricsMiddleware)
    app.add_middleware(DiscardUnreadBodyMiddleware, settings=settings)
    for kind in (SluiceError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _respond_to_error)
    app.openapi = build_openapi(app, _BODY_MODELS)  # type: ignore[method-assign]

    @cache
    def encode_openapi() -> bytes:
        return to_json(app.openapi())

    # FastAPI's own route would encode the document for each request, and it needs no API key.
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(encode_openapi(), media_type="application/json")

    return app


async def _respond_to_error(request: Request, error: Exception) -> Response:
    route = getattr(request.scope.get("route"), "path", "no route")
    problem = _to_problem(error, f"a request for {route}")
    if problem.kind == "rate-limited":
        setattr(request.state, IS_OVER_RATE, True)
    return problem.to_openai_response() if request.url.path == moderations.PATH else problem.to_response()


def _to_problem(error: Exception, subject: str) -> HttpProblem:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = str(first["loc"][-1]) if first.get("loc") else "the request"
        return HttpProblem("invalid", f"{field}: {first['msg']}", param=field)
    if isinstance(error, HTTPException):
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "malformed")
        return HttpProblem(kind, str(error.detail))
    return to_problem(error, subject)
