"""POST /v1/moderations: what OpenAI's clients expect, for images.

`flagged` is that the policy does not allow the image: its action is `review` or `block`. There is one category for
each of the policy's; the one that the guard names is true where the image is flagged and has the score, the others have
0: the guard names one category and gives one score.
"""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from services.core.messages import Verdict
from services.core.values import CATEGORIES, Policy
from services.gateway.admission import AdmittedRequest
from services.gateway.auth import Authenticator
from services.gateway.image_inputs import RequestContext, from_url
from services.gateway.load_shedding import cancel_on_disconnect
from services.gateway.problems import IMAGE_KINDS, HttpProblem, invalid_field, problem_of
from services.gateway.request_bodies import BodyReader
from services.gateway.url_fetch import ImageDownloader

PATH: Final = "/v1/moderations"
MOST_IMAGES: Final = 16
_CONCURRENT_IMAGES: Final = 4


class ImageUrl(BaseModel):
    """Where the image is."""

    url: Annotated[str, Field(description="data:image/<type>;base64,..., s3://bucket/key, or https:// where allowed")]


class ImageInput(BaseModel):
    """One image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ModerationRequest(BaseModel):
    """Images to be judged. Text is not judged here."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": [{"type": "image_url", "image_url": {"url": "s3://uploads/cat.jpg"}}], "model": "any"},
                {
                    "input": {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                    "policy": "default",
                },
            ]
        }
    )

    input: Annotated[list[ImageInput], Field(min_length=1, max_length=MOST_IMAGES)] | ImageInput
    model: Annotated[str | None, Field(description="any; the checkpoint that judges is a setting")] = None
    policy: Annotated[str, Field(max_length=256, description="`name`, or `name@7`; the tenant's unless given")] = (
        "default"
    )


class OpenAIModerationResult(BaseModel):
    """What was found about one image, with Sluice's own fields beside OpenAI's."""

    __qualname__ = "ModerationResult"  # the name in the OpenAPI document, from which clients are generated
    model_config = ConfigDict(title="ModerationResult")

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    outcome: str
    reason: str | None
    rating: str | None
    category: str | None
    rationale: str | None
    score: float | None
    action: str | None
    policy: dict[str, Any] | None
    model: dict[str, Any] | None
    effort: str | None
    verdict_id: str


class ModerationResponse(BaseModel):
    """One result for each image, in the order of the input."""

    id: str
    model: str
    results: list[OpenAIModerationResult]


class Policies(Protocol):
    """What knows policies: `services.policies.cache.PolicyCache`."""

    async def resolve(self, reference: str) -> Policy:
        """The policy that `name@7` stands for."""


def router(
    authenticator: Authenticator,
    body_reader: BodyReader,
    downloader: ImageDownloader,
    policies: Policies,
) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["moderations"])

    @routes.post(
        PATH,
        response_model=ModerationResponse,
        summary="Judge images, as OpenAI's moderation endpoint does",
        openapi_extra={"requestBody": {"required": True, "content": _content()}},
    )
    async def moderate(
        request: Request, admitted: Annotated[AdmittedRequest, Depends(authenticator.require("moderate"))]
    ) -> Response:
        wanted = _parsed(await body_reader.json(request, admitted.memory))
        inputs = wanted.input if isinstance(wanted.input, list) else [wanted.input]
        answer_id = f"modr-{uuid.uuid4().hex}"
        slots = asyncio.Semaphore(_CONCURRENT_IMAGES)

        async def judge(number: int, url: str) -> Verdict:
            async with slots:
                context = RequestContext(admitted.key, f"{answer_id}-{number}", wanted.policy)
                image = await from_url(url, context, downloader=downloader, lease=admitted.memory)
                return await admitted.judge(image)

        work = asyncio.gather(
            *(judge(number, each.image_url.url) for number, each in enumerate(inputs)), return_exceptions=True
        )
        results = await cancel_on_disconnect(work, request.is_disconnected)
        verdicts: list[Verdict] = []
        for number, verdict in enumerate(results):
            if isinstance(verdict, Verdict):
                verdicts.append(verdict)
            elif isinstance(verdict, Exception):
                problem = problem_of(verdict)
                is_single = not isinstance(wanted.input, list)
                field = "input.image_url.url" if is_single else f"input[{number}].image_url.url"
                if problem.kind == "unknown-policy":
                    field = "policy"
                raise problem.at(field) if problem.kind in IMAGE_KINDS | {"invalid"} else problem
            else:
                raise verdict
        model = next((verdict.model.name for verdict in verdicts if verdict.model), "")
        answer = {
            "id": answer_id,
            "model": model,
            "results": [result_of(verdict, await _own_categories(verdict, policies)) for verdict in verdicts],
        }
        return Response(to_json(answer), media_type="application/json")

    return routes


def result_of(verdict: Verdict, own_categories: Sequence[str] = ()) -> dict[str, Any]:
    """A verdict in OpenAI's form, with the categories that its policy adds to LlavaGuard's."""
    flagged = verdict.action != "allow"
    names = [*CATEGORIES, *own_categories]
    fields = verdict.model_dump(
        mode="json",
        include={
            *("outcome", "reason", "rating", "category", "rationale", "score", "action", "policy", "model", "effort"),
            "verdict_id",
        },
    )
    return {
        "flagged": flagged,
        "categories": {name: flagged and name == verdict.category for name in names},
        "category_scores": {name: (verdict.score or 0.0) if name == verdict.category else 0.0 for name in names},
        "category_applied_input_types": {name: ["image"] for name in names},
    } | fields


async def _own_categories(verdict: Verdict, policies: Policies) -> Sequence[str]:
    """Known here, since the image was judged by that version just now."""
    if verdict.policy is None:
        return ()
    return (await policies.resolve(f"{verdict.policy.name}@{verdict.policy.version}")).own_categories


def _parsed(document: Any) -> ModerationRequest:
    """
    Raises:
        HttpProblem: it asks for text to be judged, or a field is wrong.
    """
    _refuse_text(document)
    try:
        return ModerationRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = _path([part for part in first["loc"] if part not in {"ImageInput", "list[ImageInput]"}])
        raise invalid_field(error, field) from None


def _refuse_text(document: Any) -> None:
    given = document.get("input") if isinstance(document, dict) else None
    parts = given if isinstance(given, list) else [given]
    for number, part in enumerate(parts):
        is_text = isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")
        if is_text:
            field = f"input[{number}]" if isinstance(given, list) else "input"
            raise HttpProblem("invalid", "text is not judged here; send images as parts of type image_url", param=field)


def _path(parts: list[int | str]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _content() -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": "#/components/schemas/ModerationRequest"}}}
