"""S3: AWS, or the server at SLUICE_S3_ENDPOINT. Makes clients, reads and writes objects, and maps every error of S3."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import boto3
import urllib3.exceptions
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from services.core.errors import (
    ConfigurationError,
    Forbidden,
    NotFound,
    ObjectChanged,
    StoreUnavailable,
    Throttled,
    Unjudgeable,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SMALL_OBJECT_CONFIG: Final[Mapping[str, Any]] = {
    "connect_timeout": 5,
    "read_timeout": 10,
    "retries": {"mode": "standard", "max_attempts": 3},
}
"""The configuration of a client that reads and writes small objects only."""

_DELETE_BATCH: Final = 1000
_DETAIL_CHARACTERS: Final = 300

_CONFIGURATION_CODES: Final = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "AuthorizationQueryParametersError",
        "ExpiredToken",
        "ExpiredTokenException",
        "IllegalLocationConstraintException",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "PermanentRedirect",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
        "XAmzContentSHA256Mismatch",
    }
)
"""Sluice's credentials, clock or region are wrong. Every request fails until they are corrected, so all wait."""
_THROTTLE_CODES: Final = frozenset(
    {
        "RequestLimitExceeded",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_TRANSIENT_CODES: Final = frozenset({"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable"})
_TRANSIENT_STATUSES: Final = frozenset({301, 307, 401, 407, 408, 425, 429})
_NO_SUCH_KEY_CODES: Final = frozenset({"NoSuchKey", "404"})
_NOT_FOUND_CODES: Final = _NO_SUCH_KEY_CODES | {
    "InvalidBucketName",
    "KeyTooLongError",
    "MethodNotAllowed",
    "NoSuchBucket",
    "NoSuchVersion",
}
_CONDITION_CODES: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
"""The condition of a request does not hold: `If-Match` for a read, `If-None-Match` for a write."""

_CREDENTIAL_ERRORS: Final = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
"""boto3 found no usable credentials, so it sent no request."""

_ERRORS: Final = (ClientError, BotoCoreError, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError)
"""All errors that boto3 raises from a request or while its body is read."""


def s3_client(endpoint: str | None, *, credentials: Mapping[str, str] | None = None, **config: Any) -> "S3Client":
    """A client of AWS, or of the server at `endpoint`.

    `credentials` are arguments of boto3's `client`; without them, the credentials come from AWS's credential sources.
    `config` goes to botocore's `Config`.

    Raises:
        ConfigurationError: AWS's variables and files, or the endpoint, are not usable.
    """
    extra: dict[str, Any] = dict(credentials or {})
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            config=Config(
                s3={"addressing_style": "path" if endpoint else "auto"},
                # S3 servers other than AWS refuse the checksums that AWS supports.
                request_checksum_calculation="when_required" if endpoint else "when_supported",
                response_checksum_validation="when_required",
                **config,
            ),
            **extra,
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"S3 cannot be used: {error}; correct SLUICE_S3_ENDPOINT or AWS's settings") from None


@contextmanager
def map_s3_errors(name: str) -> Iterator[None]:
    """Raise every error of S3 as one of Sluice's. `name` is the object or bucket that the sentence is about.

    Raises:
        NotFound: no such bucket, key or version.
        ObjectChanged: the condition of the request does not hold.
        Forbidden: S3 denies the request.
        StoreUnavailable: a temporary error, or wrong credentials, which operators can correct while submissions wait.
    """
    try:
        yield
    except _ERRORS as error:
        raise _map_error(error, name) from None


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """An object in a listing."""

    key: str
    size: int


class Bucket:
    """The objects of one bucket. Blocking: call it off the event loop.

    Every method raises NotFound if the bucket does not exist, Forbidden if S3 denies the request, and StoreUnavailable
    if S3 does not answer.
    """

    def __init__(self, client: "S3Client", name: str) -> None:
        self.client: Any = client
        self.name = name

    def uri(self, key: str = "") -> str:
        """The URI of an object, or of the bucket."""
        return f"s3://{self.name}/{key}"

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """Every object whose key begins with `prefix`, in the order of the keys."""
        for page in self._pages(prefix):
            for found in page.get("Contents", ()):
                yield ObjectEntry(found["Key"], found["Size"])

    def folders(self, prefix: str) -> list[str]:
        """The prefixes one level below `prefix`, in order. Each ends with a slash."""
        pages = self._pages(prefix, Delimiter="/")
        return [str(found["Prefix"]) for page in pages for found in page.get("CommonPrefixes", ())]

    def first_key(self, prefix: str) -> str | None:
        """The first key that begins with `prefix`, or None."""
        with map_s3_errors(self.uri(prefix)):
            page = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=1)
        return next((str(found["Key"]) for found in page.get("Contents", ())), None)

    def find(self, key: str) -> bytes | None:
        """The content of an object, or None if there is no such object."""
        with map_s3_errors(self.uri(key)):
            try:
                return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())
            except ClientError as error:
                if _code(error) in _NO_SUCH_KEY_CODES:
                    return None
                raise

    def read(self, key: str, *, byte_range: str | None = None, etag: str | None = None) -> bytes:
        """The content of an object, or the part of it in `byte_range`, for example `bytes=0-99`.

        Raises:
            NotFound: there is no such object.
            ObjectChanged: the object's ETag is not `etag`.
        """
        conditions = {name: value for name, value in (("Range", byte_range), ("IfMatch", etag)) if value}
        with map_s3_errors(self.uri(key)):
            return bytes(self.client.get_object(Bucket=self.name, Key=key, **conditions)["Body"].read())

    def head(self, key: str) -> tuple[int, str]:
        """The size and the ETag of an object.

        Raises:
            NotFound: there is no such object.
        """
        with map_s3_errors(self.uri(key)):
            head = self.client.head_object(Bucket=self.name, Key=key)
        return head["ContentLength"], head["ETag"]

    def create(self, key: str, body: bytes, *, content_type: str = "binary/octet-stream") -> bool:
        """Write an object unless the key is taken. Returns whether it was written."""
        try:
            with map_s3_errors(self.uri(key)):
                self.client.put_object(Bucket=self.name, Key=key, Body=body, ContentType=content_type, IfNoneMatch="*")
        except ObjectChanged:
            return False
        return True

    def put(self, key: str, body: bytes | BinaryIO) -> tuple[str | None, str | None]:
        """Write an object, in place of any other. Returns its version id, in a bucket with versions, and its ETag."""
        with map_s3_errors(self.uri(key)):
            answer = self.client.put_object(Bucket=self.name, Key=key, Body=body)
        return answer.get("VersionId"), answer.get("ETag")

    def delete_each(self, keys: Sequence[str]) -> None:
        """Delete several objects."""
        for first in range(0, len(keys), _DELETE_BATCH):
            batch = [{"Key": key} for key in keys[first : first + _DELETE_BATCH]]
            with map_s3_errors(self.uri()):
                self.client.delete_objects(Bucket=self.name, Delete={"Objects": batch, "Quiet": True})

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[Mapping[str, Any]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix, **arguments)
        with map_s3_errors(self.uri(prefix)):
            yield from pages


def _map_error(error: Exception, name: str) -> Unjudgeable | StoreUnavailable:
    if isinstance(error, ParamValidationError):
        return NotFound(f"{name} cannot be the name of an object")
    if not isinstance(error, ClientError):
        detail = f"{type(error).__name__}: {error}"[:_DETAIL_CHARACTERS]
        if isinstance(error, _CREDENTIAL_ERRORS):
            return StoreUnavailable(
                f"there are no usable AWS credentials: {detail}; requests are retried; set AWS_PROFILE, give this "
                "machine a role, or use another source of AWS credentials"
            )
        return StoreUnavailable(f"the object store does not answer: {detail}")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = str(error.response.get("Error", {}).get("Message", ""))[:_DETAIL_CHARACTERS]
    return _error_of_response(status, _code(error), text, name)


def _error_of_response(status: int, code: str, text: str, name: str) -> Unjudgeable | StoreUnavailable:
    if code in _CONFIGURATION_CODES:
        return StoreUnavailable(
            f"the object store refuses Sluice's credentials or region: {code}: {text}; requests are retried; "
            "correct the AWS credentials, clock or region"
        )
    if code in _THROTTLE_CODES | _TRANSIENT_CODES or status >= 500 or status in _TRANSIENT_STATUSES:
        kind = Throttled if code in _THROTTLE_CODES or status == 429 else StoreUnavailable
        return kind(f"the object store answers {status} {code}: {text}")
    if status == 412 or code in _CONDITION_CODES:
        return ObjectChanged(f"{name} no longer has the expected ETag ({code})")
    if code in _NOT_FOUND_CODES or status in (404, 405) or "version id" in text.lower():
        return NotFound(f"{name} does not exist ({code})")
    if code == "InvalidObjectState":
        return Forbidden(f"{name} is archived and must be restored before it can be read")
    return Forbidden(
        f"the object store denies access to {name}: {code}: {text}; grant it, or correct SLUICE_S3_BUCKETS"
    )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
