"""What can go wrong with a request, in the two forms that clients read: RFC 9457, and OpenAI's error object.

`type` is `urn:sluice:problem:` and a name of `KINDS`; neither names nor statuses change once they are released.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from services.core import telemetry
from services.core.errors import DeadLetterReason, SluiceError, Unavailable, Unjudgeable

PREFIX: Final = "urn:sluice:problem:"
MEDIA_TYPE: Final = "application/problem+json"
_RETRY_AFTER_S: Final = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of problem."""

    status: int
    title: str


KINDS: Final[Mapping[str, Kind]] = {
    "malformed": Kind(400, "The request is not well-formed"),
    "unauthenticated": Kind(401, "The API key is missing or not known"),
    "not-permitted": Kind(403, "The API key's role does not allow this"),
    "image-forbidden": Kind(403, "The image may not be read"),
    "not-found": Kind(404, "There is nothing here"),
    "method-not-allowed": Kind(405, "The method is not one of this resource"),
    "body-too-slow": Kind(408, "The body took too long to arrive"),
    "image-changed": Kind(409, "The object is not the one that the request names"),
    "policy-conflict": Kind(409, "The policy's roll-out does not allow this change"),
    "body-too-large": Kind(413, "The body is too large"),
    "image-too-large": Kind(413, "The image has too many bytes or pixels"),
    "unsupported-media-type": Kind(415, "The body is of a kind that is not read here"),
    "invalid": Kind(422, "A field of the request is wrong"),
    "image-not-found": Kind(422, "There is no such object"),
    "not-an-image": Kind(422, "The bytes are not an image that can be decoded"),
    "unknown-policy": Kind(422, "There is no such policy or version"),
    "image-refused": Kind(422, "The engine refuses the image"),
    "url-refused": Kind(422, "The URL is not fetched"),
    "bad-policy": Kind(422, "The policy document is wrong"),
    "idempotency-key-reused": Kind(422, "The idempotency key came with another request before"),
    "rate-limited": Kind(429, "Too many requests with this API key"),
    "too-many-at-once": Kind(429, "Too many requests at a time with this API key"),
    "overloaded": Kind(429, "The gateway has as much to do as it can"),
    "internal": Kind(500, "The gateway failed"),
    "interrupted": Kind(503, "The process that judged it has ended"),
    "unavailable": Kind(503, "Something that is needed is away"),
}

_OF_REASON: Final[Mapping[DeadLetterReason, str]] = {
    "malformed": "malformed",
    "forbidden": "image-forbidden",
    "not_found": "image-not-found",
    "changed": "image-changed",
    "too_large": "image-too-large",
    "not_an_image": "not-an-image",
    "unknown_policy": "unknown-policy",
    "expired": "unavailable",
    "guard_failed": "image-refused",
}
IMAGE_KINDS: Final = frozenset(_OF_REASON.values()) | {"url-refused"}


class HttpProblem(SluiceError):
    """A request that is refused, or cannot be answered. `str(problem)` is one sentence for who sent it."""

    def __init__(
        self, kind: str, detail: str, *, param: str | None = None, retry_after_s: float | None = None, **more: Any
    ) -> None:
        """`param` names the field at fault; `more` are further members of the document."""
        super().__init__(detail)
        self.kind = kind
        self.param = param
        self.more = more
        self.retry_after_s = retry_after_s
        if retry_after_s is None and self.status in {429, 503}:
            self.retry_after_s = _RETRY_AFTER_S

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def document(self) -> dict[str, Any]:
        """The members of the problem document."""
        kind = KINDS[self.kind]
        document = {"type": PREFIX + self.kind, "title": kind.title, "status": kind.status, "detail": str(self)}
        return document | ({"param": self.param} if self.param else {}) | self.more

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> "HttpProblem":
        """The inverse of `document`, for one that was kept."""
        more = {name: document[name] for name in document.keys() - {"type", "title", "status", "detail", "param"}}
        kind = str(document["type"]).removeprefix(PREFIX)
        return cls(kind, str(document["detail"]), param=document.get("param"), **more)

    def at(self, param: str) -> "HttpProblem":
        """The same problem, with the field that it is about."""
        return HttpProblem(self.kind, str(self), param=param, retry_after_s=self.retry_after_s, **self.more)

    def response(self) -> Response:
        """The problem as the answer, counted."""
        telemetry.GATEWAY_REFUSED.inc(1, {"reason": self.kind})
        return Response(to_json(self.document()), self.status, self._headers(), MEDIA_TYPE)

    def openai_response(self) -> Response:
        """The same in the form of OpenAI's error object. What is wrong with an input is a 400 there."""
        telemetry.GATEWAY_REFUSED.inc(1, {"reason": self.kind})
        error = {"message": str(self), "type": self._openai_type(), "param": self.param, "code": self._openai_code()}
        return Response(to_json({"error": error}), self._openai_status(), self._headers(), "application/json")

    def _headers(self) -> dict[str, str]:
        headers = {"Cache-Control": "no-store"}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers

    def _openai_status(self) -> int:
        return 400 if self.kind in IMAGE_KINDS - {"unavailable"} or self.status == 422 else self.status

    def _openai_type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status >= 500:
            return "server_error"
        return "invalid_request_error"

    def _openai_code(self) -> str:
        known = {"unauthenticated": "invalid_api_key", "rate-limited": "rate_limit_exceeded"}
        return known.get(self.kind) or self.kind.replace("-", "_")


def invalid_field(error: ValidationError, field: str | None = None) -> HttpProblem:
    """The first field that a model refused, as a problem; `field` names it in another way than `a.b`."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(map(str, first["loc"])) if field is None else field
    return HttpProblem("invalid", f"{name or 'the body'}: {first['msg']}", param=name or None)


def problem_of(error: Exception) -> HttpProblem:
    """What an error that was raised on the way says to the client. What nobody expects is logged."""
    match error:
        case HttpProblem():
            return error
        case Unjudgeable():
            return HttpProblem(_OF_REASON[error.reason], str(error))
        case Unavailable() | TimeoutError():
            log.warning("a request could not be answered: %s", error)
            return HttpProblem("unavailable", "something that is needed for an answer is away; try again later")
        case _:
            log.error("a request failed", exc_info=error)
            return HttpProblem("internal", "the gateway failed; its log says why")
