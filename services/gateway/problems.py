"""The errors of the HTTP API, in the two forms that clients read: RFC 9457 and OpenAI's error object.

`type` is `urn:sluice:problem:` and a name in `PROBLEM_KINDS`. Names and statuses never change after their release.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from services.core import telemetry
from services.core.errors import DeadLetterReason, NotFound, ObjectOutOfScope, SluiceError, Unavailable, Unjudgeable

TYPE_PREFIX: Final = "urn:sluice:problem:"
MEDIA_TYPE: Final = "application/problem+json"
_RETRY_AFTER_S: Final = 1.0

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One type of problem."""

    status: int
    title: str


PROBLEM_KINDS: Final[Mapping[str, ProblemKind]] = {
    "malformed": ProblemKind(400, "The request is not well-formed"),
    "unauthenticated": ProblemKind(401, "The API key is missing or unknown"),
    "not-permitted": ProblemKind(403, "The API key does not allow this request"),
    "image-forbidden": ProblemKind(403, "Sluice may not read the image"),
    "not-found": ProblemKind(404, "The resource does not exist"),
    "method-not-allowed": ProblemKind(405, "The resource does not have this method"),
    "body-too-slow": ProblemKind(408, "The body took too long to arrive"),
    "image-changed": ProblemKind(409, "The object is not the version that the request names"),
    "policy-conflict": ProblemKind(409, "The policy's rollout does not allow this change"),
    "body-too-large": ProblemKind(413, "The body is too large"),
    "image-too-large": ProblemKind(413, "The image has too many bytes or pixels"),
    "unsupported-media-type": ProblemKind(415, "The gateway does not read bodies of this type"),
    "invalid": ProblemKind(422, "A field of the request is invalid"),
    "image-not-found": ProblemKind(422, "The object does not exist"),
    "not-an-image": ProblemKind(422, "The bytes are not an image that can be decoded"),
    "unknown-policy": ProblemKind(422, "The policy or its version does not exist"),
    "image-refused": ProblemKind(422, "The engine refuses the image"),
    "url-refused": ProblemKind(422, "The gateway does not fetch this URL"),
    "bad-policy": ProblemKind(422, "The policy document is invalid"),
    "idempotency-key-reused": ProblemKind(422, "A different request has used the idempotency key"),
    "rate-limited": ProblemKind(429, "The API key has sent too many images a second"),
    "too-many-at-once": ProblemKind(429, "The API key has too many concurrent requests"),
    "overloaded": ProblemKind(429, "The gateway is at capacity"),
    "internal": ProblemKind(500, "The gateway failed"),
    "interrupted": ProblemKind(503, "The process that judged the image has ended"),
    "unavailable": ProblemKind(503, "A backend is unavailable"),
}

_KIND_OF_REASON: Final[Mapping[DeadLetterReason, str]] = {
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
IMAGE_KINDS: Final = frozenset(_KIND_OF_REASON.values()) | {"url-refused"}


class HttpProblem(SluiceError):
    """A request that is refused or cannot be answered. `str(problem)` is one sentence for the client."""

    def __init__(
        self, kind: str, detail: str, *, param: str | None = None, retry_after_s: float | None = None, **more: Any
    ) -> None:
        """`param` is the name of the invalid field; `more` are further members of the document."""
        super().__init__(detail)
        self.kind = kind
        self.param = param
        self.more = more
        self.retry_after_s = retry_after_s
        if retry_after_s is None and self.status in {429, 503}:
            self.retry_after_s = _RETRY_AFTER_S

    @property
    def status(self) -> int:
        """The HTTP status."""
        return PROBLEM_KINDS[self.kind].status

    def to_document(self) -> dict[str, Any]:
        """Return the members of the RFC 9457 document."""
        kind = PROBLEM_KINDS[self.kind]
        document = {"type": TYPE_PREFIX + self.kind, "title": kind.title, "status": kind.status, "detail": str(self)}
        return document | ({"param": self.param} if self.param else {}) | self.more

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "HttpProblem":
        """Return the problem of a stored document: the inverse of `to_document`."""
        more = {name: document[name] for name in document.keys() - {"type", "title", "status", "detail", "param"}}
        kind = str(document["type"]).removeprefix(TYPE_PREFIX)
        return cls(kind, str(document["detail"]), param=document.get("param"), **more)

    def with_param(self, param: str) -> "HttpProblem":
        """Return the same problem with another `param`."""
        return HttpProblem(self.kind, str(self), param=param, retry_after_s=self.retry_after_s, **self.more)

    def to_response(self) -> Response:
        """Return the response with the RFC 9457 document, and count it."""
        telemetry.GATEWAY_REFUSED.inc(1, {"reason": self.kind})
        return Response(to_json(self.to_document()), self.status, self._headers(), MEDIA_TYPE)

    def to_openai_response(self) -> Response:
        """Return the response with OpenAI's error object, and count it. As at OpenAI, invalid input has status 400."""
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


def parse_body(model: type[M], document: Any) -> M:
    """Validate a decoded JSON document.

    Raises:
        HttpProblem: a field is invalid. The problem names the first one.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise to_invalid_field(error) from None


def to_invalid_field(
    error: ValidationError, format_path: Callable[[list[int | str]], str] | None = None
) -> HttpProblem:
    """Return the problem for the first field that a model refuses. By default, its name is written as `a.b`."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = list(first["loc"])
    name = format_path(path) if format_path else ".".join(map(str, path))
    return HttpProblem("invalid", f"{name or 'the body'}: {first['msg']}", param=name or None)


def to_problem(error: Exception, subject: str) -> HttpProblem:
    """Return the problem that a client gets for an error. The log gets the details of outages and unexpected errors.

    `subject` begins the sentence in the log: the request or the assessment that failed.
    """
    match error:
        case HttpProblem():
            return error
        case NotFound() | ObjectOutOfScope():
            # The same sentence for both, or it would say which objects of other tenants exist.
            return HttpProblem("image-not-found", "the object does not exist, or this API key may not use it")
        case Unjudgeable():
            return HttpProblem(_KIND_OF_REASON[error.reason], str(error))
        case Unavailable() | TimeoutError():
            log.warning("%s ends with status 503, because a backend is unavailable: %s", subject, error)
            return HttpProblem("unavailable", "a backend of the gateway is unavailable; try again later")
        case _:
            log.error("%s ends with status 500, because of an unexpected error", subject, exc_info=error)
            return HttpProblem("internal", "the gateway failed; its log has the error")
