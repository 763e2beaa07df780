"""The wire: submissions, verdicts and dead letters, and the headers of their messages."""

import hashlib
import math
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json, to_json

from services.core.errors import DeadLetterReason, Malformed
from services.core.s3_uri import parse_s3_uri
from services.core.values import (
    Action,
    AppliedCalibration,
    Effort,
    ImageFacts,
    ModelIdentity,
    PolicyIdentity,
    Priority,
    Rating,
    ReviewReason,
    VerdictOutcome,
    WireModel,
)

METADATA_LIMIT_BYTES: Final = 65_536
"""Metadata travels on into the verdict, which must fit into one message too."""

OWN_HEADER_PREFIX: Final = "sluice-"
"""How the names of headers begin that only Sluice sets."""

ATTEMPTS_HEADER: Final = "sluice-attempts"

REPLAYED_FROM_HEADER: Final = "sluice-replayed-from"
"""Header of a replayed submission: the position of its dead letter. `ATTEMPTS_HEADER` counts the earlier tries."""

_ATTEMPTS_DIGITS: Final = 6

_VERDICT_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:sluice:verdict")


def _as_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Moment = Annotated[datetime, AfterValidator(_as_utc)]
"""A point in time, always UTC; one without a zone is taken as UTC."""

ETag = Annotated[str, AfterValidator(lambda etag: etag.strip('"'))]
"""An S3 entity tag without the quotes that HTTP puts around it."""


def _null_as(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


class ObjectReference(WireModel):
    """One object in S3, optionally pinned to a version or to the ETag it is expected to have."""

    bucket: str
    key: str
    version_id: str | None = None
    etag: ETag | None = None

    @classmethod
    def from_uri(cls, uri: str, *, version_id: str | None = None, etag: str | None = None) -> Self:
        """The object at `s3://bucket/key`.

        Raises:
            ValueError: the URI has another form.
        """
        bucket, key = parse_s3_uri(uri)
        if not key:
            raise ValueError("must be s3://bucket/key")
        return cls(bucket=bucket, key=key, version_id=version_id, etag=etag)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


_ID_LIMIT: Final = 256


def make_submission_id(name: str) -> str:
    """The submission id of something with this name: the name itself, or of one that is too long its digest."""
    return name if len(name) <= _ID_LIMIT else f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


class ImageRequest(WireModel):
    """A request to judge one image: by reference (`Submission`), or with the image's bytes (`Upload`)."""

    id: Annotated[str, Field(min_length=1, max_length=_ID_LIMIT)]
    uri: str
    version_id: str | None = None
    etag: ETag | None = None
    tenant: Annotated[str, _null_as("default"), Field(max_length=256)] = "default"
    policy: Annotated[
        str,
        _null_as("default"),
        Field(max_length=256, description="`name` for the active version, or `name@7` for that version"),
    ] = "default"
    priority: Annotated[Priority, _null_as("live")] = "live"
    submitted_at: Moment | None = None
    metadata: Annotated[dict[str, Any], _null_as({})] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _metadata_fits(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        if not _is_finite(metadata):
            # 1e999 is valid JSON but decodes to infinity, which a verdict could not carry on.
            raise ValueError("a number is out of range")
        if len(to_json(metadata)) > METADATA_LIMIT_BYTES:
            raise ValueError(f"is larger than {METADATA_LIMIT_BYTES} bytes")
        return metadata

    @property
    def reference(self) -> ObjectReference | None:
        """The object that has the image; None if the bytes come with the request."""
        return None

    @classmethod
    def parse(cls, document: Any) -> Self:
        """Validate a decoded JSON document.

        Raises:
            Malformed: with one sentence that names the field, and the id where one could be read.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the message"
            raise Malformed(f"{field}: {first['msg']}", read_submission_id(document)) from None
        except (ArithmeticError, RecursionError, ValueError):
            # Dates beyond the calendar and integers beyond printing get past the model's own validation.
            raise Malformed("a value is out of range", read_submission_id(document)) from None


class Submission(ImageRequest):
    """A request to judge one image, by reference."""

    uri: Annotated[str, Field(description="s3://bucket/key", max_length=2048)]

    @field_validator("uri")
    @classmethod
    def _names_an_object(cls, uri: str) -> str:
        _, key = parse_s3_uri(uri)
        if not key:
            raise ValueError("must be s3://bucket/key")
        return uri

    @property
    def reference(self) -> ObjectReference:
        return ObjectReference.from_uri(self.uri, version_id=self.version_id, etag=self.etag)


class Upload(ImageRequest):
    """A request to judge one image that came with it: there is no object to refer to."""

    uri: Annotated[str, Field(pattern=r"^upload:sha256:[0-9a-f]{64}$", description="upload:sha256:<hex>")]

    @staticmethod
    def make_uri(data: bytes) -> str:
        """The URI of an image that is stored nowhere: the digest of its bytes."""
        return f"upload:sha256:{hashlib.sha256(data).hexdigest()}"


def _is_finite(value: Any) -> bool:
    # Depth is bounded by the JSON decoder (200).
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else True


def decode_json(value: bytes) -> Any:
    """Decode one JSON text (RFC 8259: UTF-8, no NaN or Infinity).

    Raises:
        Malformed: it is not UTF-8 or not JSON.
    """
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise Malformed(f"the message is not JSON in UTF-8: {error}") from None


def read_submission_id(document: Any) -> str | None:
    """The submission id of a document that may be malformed elsewhere, or None."""
    candidate = document.get("id") if isinstance(document, dict) else None
    return candidate if isinstance(candidate, str) and 0 < len(candidate) <= 256 else None


class Timings(WireModel):
    """Milliseconds that a submission spent in each step."""

    queued: int = 0
    fetch: int = 0
    prepare: int = 0
    guard: int = 0
    total: int = 0


class Verdict(WireModel):
    """The answer to one submission."""

    verdict_id: str
    submission_id: str
    uri: str
    version_id: str | None
    etag: str | None
    sha256: str | None
    tenant: str
    outcome: VerdictOutcome
    reason: ReviewReason | None = None
    rating: Rating | None
    category: str | None
    rationale: str | None
    score: Annotated[float, Field(ge=0, le=1, description="P(Unsafe)")] | None
    action: Action | None
    policy: PolicyIdentity | None
    model: ModelIdentity | None
    calibration: AppliedCalibration | None = None
    effort: Effort | None
    source: Literal["guard"] | None = "guard"
    image: ImageFacts | None
    timings_ms: Timings
    metadata: dict[str, Any]
    submitted_at: Moment
    judged_at: Moment


def make_verdict_id(
    *,
    submission_id: str,
    uri: str,
    object_version: str,
    policy_digest: str,
    model_revision: str,
    calibration: str | None = None,
) -> str:
    """UUIDv5 of what was judged by what: judging the same thing again gives the same id.

    `object_version` is the object's version id, else its ETag, else the sha256 of its bytes; `calibration` is the
    digest of the map that was applied to the score, if any.
    """
    judged_by = [policy_digest, model_revision] if calibration is None else [policy_digest, model_revision, calibration]
    name = to_json([submission_id, uri, object_version, *judged_by]).decode()
    return str(uuid.uuid5(_VERDICT_NAMESPACE, name))


class DeadLetter(WireModel):
    """A submission that can never be judged. The original bytes are the dead letter's value; this is its headers."""

    model_config = ConfigDict(
        alias_generator=lambda name: f"sluice-{name.replace('_', '-')}", validate_by_name=True, validate_by_alias=True
    )

    submission_id: str | None = None
    reason: DeadLetterReason
    detail: Annotated[str, Field(description="one sentence")]
    attempts: int
    source: Annotated[str, Field(description="stream/partition/offset (Kafka) or stream/id (Redis Streams)")]
    failed_at: Moment

    def headers(self) -> tuple[tuple[str, bytes], ...]:
        """One header for each field that is known, UTF-8."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return tuple((name, str(value).encode()) for name, value in fields.items())

    @classmethod
    def from_headers(cls, headers: Iterable[tuple[str, bytes]]) -> Self:
        """The inverse of `headers`; headers that are not Sluice's are ignored."""
        return cls.model_validate(
            {name: value.decode(errors="replace") for name, value in headers if name.startswith(OWN_HEADER_PREFIX)}
        )


def remove_own_headers(headers: Iterable[tuple[str, bytes]]) -> tuple[tuple[str, bytes], ...]:
    """What a message says besides its value and key, without what only Sluice may say."""
    return tuple((name, value) for name, value in headers if not name.lower().startswith(OWN_HEADER_PREFIX))


def count_earlier_attempts(headers: Iterable[tuple[str, bytes]]) -> int:
    """How often a replayed submission was tried until it became the dead letter that it was; 0 for any other."""
    own = {name.lower(): value for name, value in headers}
    attempts = own.get(ATTEMPTS_HEADER, b"") if REPLAYED_FROM_HEADER in own else b""
    return int(attempts) if attempts.isdigit() and len(attempts) <= _ATTEMPTS_DIGITS else 0
