"""POST /v1/moderations: OpenAI's moderation endpoint, for images."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic_core import to_json

from services.core.messages import Verdict
from services.core.values import Policy
from services.gateway.admission import AdmittedRequest
from services.gateway.auth import Authenticator
from services.gateway.client_disconnect import cancel_on_disconnect
from services.gateway.openapi import describe_json_body
from services.gateway.problems import IMAGE_KINDS, to_problem
from services.gateway.request_bodies import BodyReader
from services.gateway.routes.moderation_bodies import (
    ModerationRequest,
    ModerationResponse,
    parse_request,
    to_openai_result,
)
from services.gateway.submitted_images import RequestContext, from_url
from services.gateway.url_fetch import ImageDownloader

PATH: Final = "/v1/moderations"
_CONCURRENT_IMAGES: Final = 4


class PolicyResolver(Protocol):
    """Finds policy versions: `services.policies.cache.PolicyCache`."""

    async def resolve(self, reference: str) -> Policy:
        """Return the policy version of `name@7`."""


def build_router(
    authenticator: Authenticator,
    body_reader: BodyReader,
    downloader: ImageDownloader,
    policies: PolicyResolver,
) -> APIRouter:
    """Build the route."""
    routes = APIRouter(tags=["moderations"])

    @routes.post(
        PATH,
        response_model=ModerationResponse,
        summary="Judge images, in the form of OpenAI's moderation endpoint",
        openapi_extra=describe_json_body(ModerationRequest),
    )
    async def moderate(
        request: Request, admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))]
    ) -> Response:
        wanted = parse_request(await body_reader.read_json(request, admitted.memory))
        inputs = wanted.input if isinstance(wanted.input, list) else [wanted.input]
        response_id = f"modr-{uuid.uuid4().hex}"
        slots = asyncio.Semaphore(await admitted.count_images(len(inputs), _CONCURRENT_IMAGES))

        async def judge(number: int, url: str) -> Verdict:
            async with slots:
                context = RequestContext(admitted.api_key, f"{response_id}-{number}", wanted.policy)
                image = await from_url(url, context, downloader=downloader, lease=admitted.memory)
                return await admitted.judge(image)

        work = asyncio.gather(
            *(judge(number, each.image_url.url) for number, each in enumerate(inputs)), return_exceptions=True
        )
        verdicts = _unwrap(
            await cancel_on_disconnect(work, request.is_disconnected), is_list=isinstance(wanted.input, list)
        )
        model = next((verdict.model.name for verdict in verdicts if verdict.model), "")
        body = {
            "id": response_id,
            "model": model,
            "results": [
                to_openai_result(verdict, await _find_own_categories(verdict, policies)) for verdict in verdicts
            ],
        }
        return Response(to_json(body), media_type="application/json")

    return routes


def _unwrap(results: Sequence[Verdict | BaseException], *, is_list: bool) -> list[Verdict]:
    """Return the verdicts.

    Raises:
        HttpProblem: an image has no verdict. The problem is of the first such image and names its field.
    """
    verdicts: list[Verdict] = []
    for number, result in enumerate(results):
        if isinstance(result, Verdict):
            verdicts.append(result)
        elif isinstance(result, Exception):
            problem = to_problem(result, f"a request for {PATH}")
            if problem.kind == "unknown-policy":
                raise problem.with_param("policy")
            field = f"input[{number}].image_url.url" if is_list else "input.image_url.url"
            raise problem.with_param(field) if problem.kind in IMAGE_KINDS | {"invalid"} else problem
        else:
            raise result
    return verdicts


async def _find_own_categories(verdict: Verdict, policies: PolicyResolver) -> Sequence[str]:
    """Return the categories that the verdict's policy adds. This process has just judged by it, so it is cached."""
    if verdict.policy is None:
        return ()
    return (await policies.resolve(f"{verdict.policy.name}@{verdict.policy.version}")).own_categories
