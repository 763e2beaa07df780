"""The bodies of /v1/moderations: OpenAI's requests and responses, for images.

`flagged` is true if the policy does not allow the image: its action is `review` or `block`. The guard names one
category and gives one score. So in `categories`, only that category can be true (if the image is flagged), and in
`category_scores`, it has the score and the other categories have 0.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.messages import Verdict
from services.core.values import CATEGORIES
from services.gateway.problems import HttpProblem, to_invalid_field
from services.gateway.rate_limits import MAX_IMAGES


class ImageUrl(BaseModel):
    """The URL of an image."""

    url: Annotated[
        str,
        Field(description="data:image/<type>;base64,..., s3://bucket/key, or https://, if the settings allow the host"),
    ]


class ImageInput(BaseModel):
    """One image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ModerationRequest(BaseModel):
    """Images to judge. Text is refused."""

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

    input: Annotated[list[ImageInput], Field(min_length=1, max_length=MAX_IMAGES)] | ImageInput
    model: Annotated[str | None, Field(description="any value; the checkpoint that judges is a setting")] = None
    policy: Annotated[
        str, Field(max_length=256, description="`name`, or `name@7` for one version; by default the tenant's policy")
    ] = "default"


class OpenAIModerationResult(BaseModel):
    """The result of one image: OpenAI's fields, then Sluice's own."""

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


def parse_request(document: Any) -> ModerationRequest:
    """
    Raises:
        HttpProblem: the input has text, or a field is invalid.
    """
    _refuse_text(document)
    try:
        return ModerationRequest.model_validate(document)
    except ValidationError as error:
        raise to_invalid_field(error, _format_path) from None


def _refuse_text(document: Any) -> None:
    given = document.get("input") if isinstance(document, dict) else None
    parts = given if isinstance(given, list) else [given]
    if len(parts) > MAX_IMAGES:
        raise HttpProblem("invalid", f"input: a list may have at most {MAX_IMAGES} images", param="input")
    for number, part in enumerate(parts):
        is_text = isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")
        if is_text:
            field = f"input[{number}]" if isinstance(given, list) else "input"
            raise HttpProblem(
                "invalid", "Sluice does not judge text; send images as parts of type image_url", param=field
            )


def _format_path(parts: Sequence[int | str]) -> str:
    """Return a field as OpenAI's clients write it: `input[0].image_url.url`."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in {"ImageInput", "list[ImageInput]"}:  # pydantic's names of the alternatives of `input`
            path += f".{part}" if path else part
    return path


def to_openai_result(verdict: Verdict, own_categories: Sequence[str] = ()) -> dict[str, Any]:
    """Return a verdict in OpenAI's form. `own_categories` are those that its policy adds to LlavaGuard's."""
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
