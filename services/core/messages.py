"""The messages on the streams: submissions, verdicts and dead letters, with their headers."""

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
"""The verdict repeats the metadata and must fit into one message, too."""

OWN_HEADER_PREFIX: Final = "sluice-"
"""Only Sluice sets headers whose names begin with this."""

ATTEMPTS_HEADER: Final = "sluice-attempts"

REPLAYED_FROM_HEADER: Final = "sluice-replayed-from"
"""Header of a replayed submission: the position of its dead letter. `ATTEMPTS_HEADER` has the earlier tries, for
members of version 0.1.0. Producers can set both, so this version looks the tries up in Redis."""

_VERDICT_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:sluice:verdict")


def _as_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


UtcDatetime = Annotated[datetime, AfterValidator(_as_utc)]
"""A point in time in UTC. A value without a time zone counts as UTC."""

ETag = Annotated[str, AfterValidator(lambda etag: etag.strip('"'))]
"""An S3 entity tag, without the quotes that HTTP puts around it."""


def _null_as(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


class ObjectReference(WireModel):
    """One object in S3. It can be pinned to a version, or to an expected ETag."""

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
    """A submission id made from a name: the name itself, or its digest if the name is too long."""
    return name if len(name) <= _ID_LIMIT else f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def make_s3_submission_id(bucket_and_key: str, version: str | None) -> str:
    """The submission id of an object in S3, made from `bucket/key` and the version, sequencer or ETag, if any."""
    return make_submission_id(f"{bucket_and_key}#{version}" if version else bucket_and_key)


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
    submitted_at: UtcDatetime | None = None
    metadata: Annotated[dict[str, Any], _null_as({})] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        if not _is_finite(metadata):
            # 1e999 is valid JSON but decodes to infinity, which cannot be written into the verdict.
            raise ValueError("a number is out of range")
        if len(to_json(metadata)) > METADATA_LIMIT_BYTES:
            raise ValueError(f"is larger than {METADATA_LIMIT_BYTES} bytes")
        return metadata

    @property
    def reference(self) -> ObjectReference | None:
        """The object with the image. None if the bytes come with the request."""
        return None

    @classmethod
    def parse(cls, document: Any) -> Self:
        """Validate a decoded JSON document.

        Raises:
            Malformed: the sentence names the field. The error has the id, if it could be read.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the message"
            raise Malformed(f"{field}: {first['msg']}", read_submission_id(document)) from None
        except (ArithmeticError, RecursionError, ValueError):
            # pydantic raises these for dates outside of the calendar and for integers that are too long to print.
            raise Malformed("a value is out of range", read_submission_id(document)) from None


class Submission(ImageRequest):
    """A request to judge one image, by reference."""

    uri: Annotated[str, Field(description="s3://bucket/key", max_length=2048)]

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str) -> str:
        _, key = parse_s3_uri(uri)
        if not key:
            raise ValueError("must be s3://bucket/key")
        return uri

    @property
    def reference(self) -> ObjectReference:
        return ObjectReference.from_uri(self.uri, version_id=self.version_id, etag=self.etag)


class Upload(ImageRequest):
    """A request to judge one image whose bytes come with the request. No object in S3 has the image."""

    uri: Annotated[str, Field(pattern=r"^upload:sha256:[0-9a-f]{64}$", description="upload:sha256:<hex>")]

    @staticmethod
    def make_uri(data: bytes) -> str:
        """The URI of an image that is not stored: the digest of its bytes."""
        return f"upload:sha256:{hashlib.sha256(data).hexdigest()}"


def _is_finite(value: Any) -> bool:
    # The JSON decoder limits the depth to 200.
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
    source: Annotated[
        Literal["guard"] | None, Field(description="`guard` if the guard judged the image; null if it was not judged")
    ] = "guard"
    image: ImageFacts | None
    timings_ms: Timings
    metadata: dict[str, Any]
    submitted_at: UtcDatetime
    judged_at: UtcDatetime


def make_verdict_id(
    *,
    submission_id: str,
    uri: str,
    object_version: str,
    policy_digest: str,
    model_revision: str,
    calibration: str | None = None,
) -> str:
    """The id of a verdict. Judging the same submission again gives the same id if nothing else has changed.

    Args:
        submission_id: of the submission.
        uri: of the image.
        object_version: the object's version id, else its ETag, else the SHA-256 of its bytes.
        policy_digest: of the policy version.
        model_revision: of the checkpoint.
        calibration: the digest of the map that was applied to the score, if any.

    Returns:
        A UUIDv5 of all arguments.
    """
    judged_by = [policy_digest, model_revision] if calibration is None else [policy_digest, model_revision, calibration]
    name = to_json([submission_id, uri, object_version, *judged_by]).decode()
    return str(uuid.uuid5(_VERDICT_NAMESPACE, name))


class DeadLetter(WireModel):
    """The headers of a dead letter: a submission that can never be judged. Its value is the original bytes."""

    model_config = ConfigDict(
        alias_generator=lambda name: f"sluice-{name.replace('_', '-')}", validate_by_name=True, validate_by_alias=True
    )

    submission_id: str | None = None
    reason: DeadLetterReason
    detail: Annotated[str, Field(description="one sentence")]
    attempts: int
    source: Annotated[str, Field(description="stream/partition/offset (Kafka) or stream/id (Redis Streams)")]
    failed_at: UtcDatetime

    def headers(self) -> tuple[tuple[str, bytes], ...]:
        """One header in UTF-8 for each field that has a value."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return tuple((name, str(value).encode()) for name, value in fields.items())

    @classmethod
    def from_headers(cls, headers: Iterable[tuple[str, bytes]]) -> Self:
        """The inverse of `headers`. Ignores headers that are not Sluice's."""
        return cls.model_validate(
            {name: value.decode(errors="replace") for name, value in headers if name.startswith(OWN_HEADER_PREFIX)}
        )


def remove_own_headers(headers: Iterable[tuple[str, bytes]]) -> tuple[tuple[str, bytes], ...]:
    """The headers of a producer: all but those that only Sluice may set."""
    return tuple((name, value) for name, value in headers if not name.lower().startswith(OWN_HEADER_PREFIX))
