"""Every error of S3 becomes one of Sluice's, and a bucket reads, lists and writes objects."""

import uuid
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ParamValidationError

from services.core.errors import (
    ConfigurationError,
    Forbidden,
    NotFound,
    ObjectChanged,
    SluiceError,
    StoreUnavailable,
    Throttled,
)
from services.core.s3 import Bucket, ObjectEntry, map_s3_errors, s3_client
from services.core.s3_uri import parse_s3_uri


def error_of(error: Exception) -> SluiceError:
    with pytest.raises(SluiceError) as caught, map_s3_errors("s3://b/k"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", Forbidden),
        (403, "InvalidObjectState", Forbidden),
        (400, "InvalidRequest", Forbidden),
        (403, "SignatureDoesNotMatch", StoreUnavailable),
        (403, "InvalidAccessKeyId", StoreUnavailable),
        (400, "ExpiredToken", StoreUnavailable),
        (301, "PermanentRedirect", StoreUnavailable),
        (401, "", StoreUnavailable),
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchBucket", NotFound),
        (404, "404", NotFound),
        (405, "MethodNotAllowed", NotFound),
        (412, "PreconditionFailed", ObjectChanged),
        (412, "412", ObjectChanged),
        (409, "ConditionalRequestConflict", ObjectChanged),
        (409, "OperationAborted", StoreUnavailable),
        (503, "SlowDown", Throttled),
        (429, "", Throttled),
        (500, "InternalError", StoreUnavailable),
        (502, "", StoreUnavailable),
    ],
)
def test_map_s3_errors_error_response_becomes_one_error(status: int, code: str, expected: type[SluiceError]) -> None:
    response: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert type(error_of(ClientError(response, "GetObject"))) is expected


def test_map_s3_errors_invalid_version_id_is_not_found() -> None:
    response: Any = {
        "Error": {"Code": "InvalidArgument", "Message": "Invalid version id specified"},
        "ResponseMetadata": {"HTTPStatusCode": 400},
    }
    assert isinstance(error_of(ClientError(response, "GetObject")), NotFound)


def test_map_s3_errors_response_without_details_is_forbidden() -> None:
    assert isinstance(error_of(ClientError({}, "GetObject")), Forbidden)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EndpointConnectionError(endpoint_url="http://s3"), StoreUnavailable),
        (ConnectionResetError(), StoreUnavailable),
        (ParamValidationError(report="bad bucket"), NotFound),
    ],
)
def test_map_s3_errors_no_response_becomes_one_error(error: Exception, expected: type[SluiceError]) -> None:
    assert type(error_of(error)) is expected


def test_map_s3_errors_other_error_passes() -> None:
    with pytest.raises(KeyError), map_s3_errors("s3://b/k"):
        raise KeyError


@pytest.mark.parametrize(
    ("uri", "parts"),
    [("s3://b/k", ("b", "k")), ("s3://b/a//k/", ("b", "a//k/")), ("s3://b/", ("b", "")), ("s3://b", ("b", ""))],
)
def test_parse_s3_uri_splits_bucket_and_key(uri: str, parts: tuple[str, str]) -> None:
    assert parse_s3_uri(uri) == parts


@pytest.mark.parametrize("uri", ["", "b/k", "s3:/b/k", "s3:///k", "https://b/k", "S3://b/k"])
def test_parse_s3_uri_other_form_raises(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/key"):
        parse_s3_uri(uri)


def test_s3_client_invalid_endpoint_raises_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_S3_ENDPOINT"):
        s3_client("not a url")


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    client = s3_client(s3_endpoint)
    name = f"bucket-{uuid.uuid4()}"
    client.create_bucket(Bucket=name)
    return Bucket(client, name)


def test_bucket_create_taken_key_keeps_first_object(bucket: Bucket) -> None:
    assert bucket.create("a", b"first")
    assert not bucket.create("a", b"second")
    assert bucket.find("a") == b"first"


def test_bucket_put_taken_key_replaces_object(bucket: Bucket) -> None:
    bucket.put("a", b"first")
    _, etag = bucket.put("a", b"second")
    assert bucket.read("a") == b"second"
    assert bucket.head("a") == (6, etag)


def test_bucket_listing_has_keys_in_order(bucket: Bucket) -> None:
    for key in ("p/b/2", "p/a/1", "p/0", "q"):
        bucket.put(key, b"12")
    assert list(bucket.entries("p/")) == [ObjectEntry(key, 2) for key in ("p/0", "p/a/1", "p/b/2")]
    assert bucket.folders("p/") == ["p/a/", "p/b/"]
    assert bucket.first_key("p/") == "p/0"
    assert bucket.first_key("none/") is None


def test_bucket_listing_longer_than_a_page_is_complete(bucket: Bucket) -> None:
    for number in range(1001):
        bucket.put(f"{number:04d}", b"")
    assert [entry.key for entry in bucket.entries()] == [f"{number:04d}" for number in range(1001)]
    bucket.delete_each([entry.key for entry in bucket.entries()])
    assert list(bucket.entries()) == []


def test_bucket_read_gives_the_range_and_rejects_another_etag(bucket: Bucket) -> None:
    _, etag = bucket.put("a", b"0123456789")
    assert bucket.read("a", byte_range="bytes=2-4", etag=etag) == b"234"
    bucket.put("a", b"other")
    with pytest.raises(ObjectChanged):
        bucket.read("a", etag=etag)


def test_bucket_missing_object_is_not_found(bucket: Bucket) -> None:
    assert bucket.find("a") is None
    with pytest.raises(NotFound):
        bucket.read("a")
    with pytest.raises(NotFound):
        bucket.head("a")


def test_bucket_missing_bucket_raises_not_found(bucket: Bucket) -> None:
    missing = Bucket(bucket.client, "missing")
    for call in (
        lambda: missing.find("a"),
        lambda: missing.create("a", b""),
        lambda: missing.put("a", b""),
        lambda: missing.first_key(""),
        lambda: list(missing.entries()),
    ):
        with pytest.raises(NotFound):
            call()
