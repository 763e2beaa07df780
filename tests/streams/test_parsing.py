"""Parsing of stream messages: formats, and hostile content."""

import base64
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.messages import Submission
from services.core.tenancy import Tenancy
from services.streams.base import Headers, Message
from services.streams.parsing import RECORDS_LIMIT, InvalidMessage, ParsedSubmission, is_before, parse

PUBLISHED = datetime(2026, 11, 21, 10, tzinfo=UTC)


def message(value: Any, key: bytes | None = None, headers: Headers = ()) -> Message:
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Message(encoded, key, headers, "sluice.submissions/0/1", PUBLISHED)


def accepted(value: Any, key: bytes | None = None, headers: Headers = ()) -> ParsedSubmission:
    (entry,) = parse(message(value, key, headers))
    assert isinstance(entry, ParsedSubmission), entry
    return entry


def rejected(value: Any, key: bytes | None = None, headers: Headers = ()) -> InvalidMessage:
    (entry,) = parse(message(value, key, headers))
    assert isinstance(entry, InvalidMessage), entry
    return entry


def record(key: str = "a+b/%C3%BC%2B.jpg", name: str = "ObjectCreated:Put", **stored: Any) -> dict[str, Any]:
    """A record as S3 writes it, without unused fields."""
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-east-1",
        "eventTime": "2026-11-21T09:59:00.000Z",
        "eventName": name,
        "s3": {
            "s3SchemaVersion": "1.0",
            "bucket": {"name": "uploads", "arn": "arn:aws:s3:::uploads"},
            "object": {"key": key, "size": 1024, "eTag": "d41d8cd9", "sequencer": "0055AED6DCD90281E5", **stored},
        },
    }


# Native submissions


def test_native_submission_is_parsed() -> None:
    document = {"id": "upl-42", "uri": "s3://uploads/2026/cat.jpg", "submitted_at": "2026-11-21T09:00:00+01:00", "x": 1}
    entry = accepted(document)
    assert entry.submission == Submission.parse(document)
    assert entry.submission.submitted_at == datetime(2026, 11, 21, 8, tzinfo=UTC)
    assert entry.key == b"s3://uploads/2026/cat.jpg"
    assert entry.original == json.dumps(document).encode()
    assert entry.sequencer is None


def test_producer_key_and_publication_time_are_used() -> None:
    entry = accepted({"id": "a", "uri": "s3://b/k"}, key=b"\xff user 7")
    assert entry.key == b"\xff user 7"
    assert entry.submission.submitted_at == PUBLISHED
    assert accepted({"id": "a", "uri": "s3://b/k"}, key=b"").key == b"s3://b/k"


@pytest.mark.parametrize(
    ("document", "submission_id"),
    [
        ({"id": "a"}, "a"),
        ({"id": "a", "uri": "http://b/k"}, "a"),
        ({"id": "a", "uri": "s3://b"}, "a"),
        ({"id": "", "uri": "s3://b/k"}, None),
        ({"id": "x" * 257, "uri": "s3://b/k"}, None),
        ({"id": 7, "uri": "s3://b/k"}, None),
        ({"id": "a", "uri": "s3://b/k", "priority": "now"}, "a"),
        ({"id": "a", "uri": "s3://b/k", "submitted_at": "0001-01-01T00:00:00+23:59"}, "a"),
        ({"id": "a", "uri": "s3://b/k", "submitted_at": 1e300}, "a"),
        ({"id": "a", "uri": "s3://b/k", "metadata": [1]}, "a"),
        ({"id": "a", "uri": "s3://b/k", "metadata": {"x": "y" * 70_000}}, "a"),
        ({}, None),
        ([], None),
        ([{"id": "a", "uri": "s3://b/k"}], None),
        ("text", None),
        (None, None),
        (True, None),
        (17, None),
    ],
)
def test_invalid_submission_is_rejected(document: Any, submission_id: str | None) -> None:
    entry = rejected(document, key=b"k")
    assert entry.error.submission_id == submission_id
    assert entry.original == json.dumps(document).encode()
    assert entry.key == b"k"
    assert str(entry.error)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
        b'{"id": "\xff", "uri": "s3://b/k"}',
        b'{"id": "\\ud800", "uri": "s3://b/k"}',
        b'{"id": "a", "uri": "s3://b/\\udc00"}',
        b'{"id": "a", "uri": "s3://b/k", "metadata": {"x": NaN}}',
        b'{"id": "a", "uri": "s3://b/k", "metadata": {"x": -Infinity}}',
        b'{"id": "a", "uri": "s3://b/k", "metadata": {"x": [{"y": 1e999}]}}',
        b'{"id": "a", "uri": "s3://b/k", "metadata": {"x": ' + b"9" * 100_000 + b"}}",
        b'{"id": "a", "uri": "s3://b/k", "metadata": ' + b'{"x":' * 100_000,
        b"[" * 1_000_000,
        b'{"id": "a", "uri": "s3://b/k"} {}',
        b"\0" * 1000,
    ],
)
def test_hostile_bytes_are_rejected(value: bytes) -> None:
    entry = rejected(value)
    assert entry.original == value


def test_last_of_duplicate_keys_wins() -> None:
    assert accepted(b'{"id": "a", "id": "b", "uri": "s3://b/k"}').submission.id == "b"


def test_largest_integers_are_parsed() -> None:
    digits = b"9" * 4000
    entry = accepted(b'{"id": "a", "uri": "s3://b/k", "metadata": {"x": ' + digits + b"}}")
    assert entry.submission.metadata["x"] == int(digits)


# S3 notifications


@pytest.mark.parametrize("name", ["ObjectCreated:Put", "s3:ObjectCreated:CompleteMultipartUpload"])
def test_s3_notification_is_parsed(name: str) -> None:
    entry = accepted({"Records": [record(name=name, versionId="v1")]})
    submission = entry.submission
    assert submission.id == "uploads/a b/ü+.jpg#v1"
    assert submission.uri == "s3://uploads/a b/ü+.jpg"
    assert submission.reference.key == "a b/ü+.jpg"
    assert (submission.version_id, submission.etag) == ("v1", "d41d8cd9")
    assert submission.submitted_at == datetime(2026, 11, 21, 9, 59, tzinfo=UTC)
    assert (submission.tenant, submission.policy, submission.priority) == ("default", "default", "live")
    assert entry.sequencer == "0055AED6DCD90281E5"
    assert entry.key == "s3://uploads/a b/ü+.jpg".encode()


def test_id_without_version_uses_sequencer_then_etag() -> None:
    assert accepted({"Records": [record("k")]}).submission.id == "uploads/k#0055AED6DCD90281E5"
    assert accepted({"Records": [record("k", sequencer=None)]}).submission.id == "uploads/k#d41d8cd9"
    assert accepted({"Records": [record("k", sequencer=None, eTag=None)]}).submission.id == "uploads/k"
    assert accepted({"Records": [record("k", versionId="")]}).submission.version_id is None


def test_each_record_becomes_a_submission_with_its_own_original() -> None:
    records = [record("one"), record("gone", "ObjectRemoved:Delete"), record("two"), {"eventName": 7}, record("three")]
    entries = parse(message({"Records": records, "extra": 1}, key=b"k"))
    assert [entry.submission.uri for entry in entries if isinstance(entry, ParsedSubmission)] == [
        "s3://uploads/one",
        "s3://uploads/two",
        "s3://uploads/three",
    ]
    assert isinstance(entries[2], InvalidMessage)
    assert all(entry.key == b"k" for entry in entries)
    for entry, original in zip(entries, [records[0], records[2], records[3], records[4]], strict=True):
        assert json.loads(entry.original) == {"Records": [original], "extra": 1}
    again = parse(message(entries[0].original))
    assert isinstance(again[0], ParsedSubmission)
    assert again[0].submission == entries[0].submission  # type: ignore[union-attr]


def test_large_field_is_not_repeated_in_each_original() -> None:
    entries = parse(message({"Records": [record(str(n)) for n in range(100)], "padding": "x" * 1_000_000}))
    assert len(entries) == 100
    assert sum(len(entry.original) for entry in entries) < 100_000


@pytest.mark.parametrize(
    "document",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2026-11-21T10:00:00Z", "Bucket": "uploads"},
        {"Records": []},
        {"Records": [record(name="ObjectRemoved:Delete")]},
        {"Records": [record(name="s3:ObjectRemoved:DeleteMarkerCreated")]},
        {"Records": [record(name="ObjectRestore:Completed"), record(name="ReducedRedundancyLostObject")]},
        {"Records": [{"eventName": "s3:ObjectTagging:Put"}]},
        {"source": "aws.s3", "detail-type": "Object Deleted", "detail": {}},
    ],
)
def test_event_without_a_new_object_gives_no_submission(document: Any) -> None:
    assert parse(message(document)) == ()


@pytest.mark.parametrize(
    "document",
    [
        {"Records": None},
        {"Records": {"0": record()}},
        {"Records": "ObjectCreated:Put"},
        {"Records": [None]},
        {"Records": [[]]},
        {"Records": ["x"]},
        {"Records": [{}]},
        {"Records": [{"eventName": ["ObjectCreated:Put"]}]},
        {"Records": [{"eventName": "ObjectCreated:Put"}]},
        {"Records": [{"eventName": "ObjectCreated:Put", "s3": []}]},
        {"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": "b", "object": {"key": "k"}}}]},
        {"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b/c"}, "object": {"key": "k"}}}]},
        {"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": ""}, "object": {"key": "k"}}}]},
        {"Records": [record("")]},
        {"Records": [record(key=None)]},  # type: ignore[arg-type]
        {"Records": [record(key=5)]},  # type: ignore[arg-type]
        {"Records": [record("%FF%FE")]},
        {"Records": [record("%ED%A0%80")]},
        {"Records": [record("k", versionId=7)]},
        {"Records": [record("k", eTag={})]},
        {"Records": [record("k", sequencer=[])]},
        {"Records": [record("k") | {"eventTime": 5}]},
        {"Records": [record("k") | {"eventTime": "yesterday"}]},
        {"Records": [{}] * (RECORDS_LIMIT + 1)},
        {"Records": [{}] * 100_000},
    ],
)
def test_malformed_notification_is_rejected(document: Any) -> None:
    entry = rejected(document)
    assert json.loads(entry.original) == document


def test_long_key_gets_its_digest_as_id() -> None:
    key = "k" * 1000
    entries = parse(message({"Records": [record("one"), record(key), record(key, versionId="v2"), record("two")]}))
    assert [type(entry) for entry in entries] == [ParsedSubmission] * 4
    _, first, second, _ = [entry.submission for entry in entries if isinstance(entry, ParsedSubmission)]
    assert first.id == f"sha256:{hashlib.sha256(f'uploads/{key}#0055AED6DCD90281E5'.encode()).hexdigest()}"
    assert (first.uri, second.uri) == (f"s3://uploads/{key}",) * 2
    assert first.id != second.id


def test_notification_of_minio_is_parsed() -> None:
    document = {
        "EventName": "s3:ObjectCreated:Put",
        "Key": "uploads/a b.jpg",
        "Records": [record("a%20b.jpg", "s3:ObjectCreated:Put", versionId="", contentType="image/jpeg")],
    }
    entry = accepted(document, key=b"uploads/a b.jpg")
    assert entry.submission.uri == "s3://uploads/a b.jpg"
    assert entry.key == b"uploads/a b.jpg"


def test_sequencers_are_compared_after_padding() -> None:
    assert is_before("0055AED6DCD90281E5", "0055AED6DCD90281E6")
    assert not is_before("0055aed6", "0055AED6")
    assert is_before("0055", "00550001")
    assert not is_before("0056", "00550001")


# CloudEvents

NATIVE = {"id": "upl-1", "uri": "s3://uploads/k"}
EVENT = {"specversion": "1.0", "type": "upload", "source": "/x", "id": "event-9"}
BINARY: Headers = (
    ("ce_specversion", b"1.0"),
    ("ce_type", b"upload"),
    ("ce_source", b"/x"),
    ("ce_id", b"event-9"),
    ("content-type", b"application/json"),
)


@pytest.mark.parametrize(
    "event",
    [
        EVENT | {"data": NATIVE},
        EVENT | {"data": json.dumps(NATIVE)},
        EVENT | {"data_base64": base64.b64encode(json.dumps(NATIVE).encode()).decode()},
        EVENT | {"specversion": "1.1", "data": NATIVE},
    ],
)
def test_structured_cloud_event_keeps_the_id_of_its_submission(event: Any) -> None:
    entry = accepted(event)
    assert (entry.submission.id, entry.submission.uri) == ("upl-1", "s3://uploads/k")
    assert json.loads(entry.original) == event


@pytest.mark.parametrize("prefix", ["ce_", "ce-", "Ce-", "CE_"])
def test_binary_cloud_event_is_parsed(prefix: str) -> None:
    headers = tuple((name.replace("ce_", prefix), value) for name, value in BINARY)
    assert accepted(NATIVE, headers=headers).submission.id == "upl-1"
    assert accepted({"Records": [record("k")]}, headers=headers).submission.uri == "s3://uploads/k"
    assert parse(message({"Records": []}, headers=headers)) == ()


def test_cloud_event_with_an_s3_notification_is_split() -> None:
    event = EVENT | {"data": {"Records": [record("one"), record("two")]}}
    entries = parse(message(event))
    assert [json.loads(entry.original) for entry in entries] == [
        EVENT | {"data": {"Records": [record(key)]}} for key in ("one", "two")
    ]
    coded = EVENT | {"data_base64": base64.b64encode(json.dumps(event["data"]).encode()).decode()}
    for entry, key in zip(parse(message(coded)), ("one", "two"), strict=True):
        assert accepted(entry.original).submission.uri == f"s3://uploads/{key}"


def test_original_of_a_binary_cloud_event_is_parsed_without_headers() -> None:
    for entry in parse(message({"Records": [record("one"), record("two")]}, headers=BINARY)):
        assert isinstance(accepted(entry.original), ParsedSubmission)


@pytest.mark.parametrize(
    "event",
    [
        EVENT,
        EVENT | {"data": None},
        EVENT | {"data": 7},
        EVENT | {"data": "no JSON"},
        EVENT | {"data": {}},
        EVENT | {"data_base64": "%%%"},
        EVENT | {"data_base64": 7},
        EVENT | {"data_base64": ["x"]},
        EVENT | {"data_base64": "ÿ"},
        EVENT | {"data_base64": base64.b64encode(b"\xff").decode()},
        EVENT | {"specversion": "0.3", "data": NATIVE},
        EVENT | {"specversion": 1.0, "data": NATIVE},
        EVENT | {"specversion": None, "data": NATIVE},
        EVENT | {"data": EVENT | {"data": NATIVE}},
        EVENT | {"data": {"Records": 5}},
    ],
)
def test_malformed_cloud_event_is_rejected(event: Any) -> None:
    entry = rejected(event)
    assert json.loads(entry.original) == event


def test_malformed_submission_in_a_cloud_event_keeps_its_id() -> None:
    assert rejected(EVENT | {"data": {"id": "upl-1", "uri": "x"}}).error.submission_id == "upl-1"
    headers = (("ce_specversion", b"0.3"),)
    assert rejected(NATIVE, headers=headers).error.submission_id == "upl-1"
    assert rejected(NATIVE, headers=(("ce_specversion", b"\xff"),)).error.submission_id == "upl-1"


EVENT_BRIDGE = {
    "detail-type": "Object Created",
    "source": "aws.s3",
    "detail": {"bucket": {"name": "uploads"}, "object": {"key": "shop/cat.jpg", "etag": "e"}},
}


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        ({"Records": [record("shop/cat.jpg")]}, ()),
        ({"Records": [record("shop%2Fcat.jpg") | {"tenant": "forum"}], "tenant": "forum"}, ()),
        ({"Records": [record("shop/cat.jpg")]}, BINARY),
        ({"specversion": "1.0", "type": "t", "tenant": "forum", "data": {"Records": [record("shop/cat.jpg")]}}, ()),
        (EVENT_BRIDGE, ()),
    ],
)
def test_event_of_any_format_has_the_tenant_that_has_its_object(value: Any, headers: Headers) -> None:
    tenancy = Tenancy(("shop=s3://uploads/shop/", "forum=s3://uploads/forum/"))
    (entry,) = parse(message(value, headers=headers), tenancy)
    assert isinstance(entry, ParsedSubmission)
    assert entry.submission.tenant == "shop"
    assert accepted(value, headers=headers).submission.tenant == "default", "tenants are not separated"


def test_native_submission_keeps_the_tenant_that_it_names() -> None:
    tenancy = Tenancy(("shop=s3://uploads/shop/",))
    for fields in ({"tenant": "forum"}, {}):
        (entry,) = parse(message({"id": "1", "uri": "s3://uploads/shop/cat.jpg"} | fields), tenancy)
        assert isinstance(entry, ParsedSubmission)
        assert entry.submission.tenant == fields.get("tenant", "default")


def test_event_bridge_event_is_parsed() -> None:
    document = {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "time": "2026-11-21T09:58:00Z",
        "detail": {
            "bucket": {"name": "uploads"},
            "object": {"key": "a+b %20.jpg", "etag": "e", "version-id": "v", "sequencer": "00617F08299329D189"},
        },
    }
    entry = accepted(document)
    assert entry.submission.uri == "s3://uploads/a+b %20.jpg"
    assert entry.submission.id == "uploads/a+b %20.jpg#v"
    assert (entry.submission.etag, entry.sequencer) == ("e", "00617F08299329D189")
    assert entry.submission.submitted_at == datetime(2026, 11, 21, 9, 58, tzinfo=UTC)
    assert rejected(document | {"detail": None})
    assert rejected(document | {"detail-type": "EC2 Instance State-change", "source": "aws.ec2"})
    assert rejected(document | {"detail-type": ["Object Created"], "source": None})


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = [
    "id",
    "uri",
    "version_id",
    "etag",
    "tenant",
    "policy",
    "priority",
    "submitted_at",
    "metadata",
    "Records",
    "eventName",
    "eventTime",
    "s3",
    "bucket",
    "object",
    "name",
    "key",
    "versionId",
    "eTag",
    "sequencer",
    "specversion",
    "type",
    "data",
    "data_base64",
    "detail-type",
    "detail",
    "source",
    "Event",
    "EventName",
    "Key",
    "time",
]
VALUES = st.sampled_from(
    [
        "s3://b/k",
        "ObjectCreated:Put",
        "s3:TestEvent",
        "1.0",
        "Object Created",
        "2026-11-21T10:00:00Z",
        "",
        "e30=",
        "%FF",
    ]
)
NEAR_MISSES = st.recursive(
    VALUES | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=30,
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["ce_specversion", "ce-specversion", "ce_id", "content-type", "x"]), st.binary(max_size=8)
    ),
    max_size=3,
).map(tuple)


def check(value: bytes, key: bytes | None, headers: Headers) -> None:
    for entry in parse(message(value, key, headers)):
        assert isinstance(entry.original, bytes)
        if isinstance(entry, ParsedSubmission):
            assert 0 < len(entry.submission.id) <= 256
            assert entry.submission.submitted_at is not None
            assert entry.key == (key or entry.submission.uri.encode())
            assert entry.submission.reference.uri == entry.submission.uri
            json.loads(entry.submission.model_dump_json(), parse_constant=pytest.fail)
        else:
            assert entry.key == key
            str(entry.error).encode()


@settings(max_examples=400)
@given(st.binary(max_size=200), st.none() | st.binary(max_size=5), HEADERS)
def test_random_bytes_never_raise(value: bytes, key: bytes | None, headers: Headers) -> None:
    check(value, key, headers)


@settings(max_examples=800)
@given(NEAR_MISSES, HEADERS)
def test_almost_valid_document_never_raises(document: Any, headers: Headers) -> None:
    check(json.dumps(document).encode(errors="surrogatepass"), None, headers)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["s3", "bucket", "object", "name", "key", "eventName", "versionId", "eTag"])), NEAR_MISSES
)
def test_damaged_record_does_not_affect_others(path: list[str], replacement: Any) -> None:
    damaged = record("damaged")
    target: Any = damaged
    for name in path[:-1]:
        target = target.get(name) if isinstance(target, dict) else None
    if isinstance(target, dict) and path:
        target[path[-1]] = replacement
    value = json.dumps({"Records": [record("one"), damaged, record("two")]}).encode()
    try:
        json.loads(value.decode(), parse_constant=lambda _: 1 / 0)
    except ZeroDivisionError:
        return  # NaN is no JSON: the whole message is malformed
    entries = parse(message(value))
    if len(entries) > 1:
        assert isinstance(entries[0], ParsedSubmission)
        assert isinstance(entries[-1], ParsedSubmission)
        assert entries[-1].submission.uri == "s3://uploads/two"
    check(value, None, ())
