"""Parses stream messages: native submissions, S3 event notifications, and CloudEvents around either.

Pure: bytes and headers in, values out. `parse` never raises.
"""

from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import unquote_plus

from pydantic_core import to_json

from services.core.errors import Malformed
from services.core.messages import Submission, decode_json, make_s3_submission_id, read_submission_id
from services.core.tenancy import NOT_SEPARATED, Tenancy
from services.streams.base import Message

RECORDS_LIMIT: Final = 1000
"""Records of one S3 notification. S3 itself sends one; MinIO and forwarders send a few."""

_ENVELOPE_LIMIT_BYTES: Final = 4096
"""The fields beside `Records` are repeated in the dead letter of every record. Larger ones are dropped."""


@dataclass(frozen=True, slots=True)
class ParsedSubmission:
    """One submission of a message."""

    submission: Submission
    """`submitted_at` is always set: the producer's, else when the message was published."""
    key: bytes
    """The key of every output: the message's own key, else the submission's `uri`."""
    original: bytes
    """The value of a dead letter of this submission."""
    sequencer: str | None = None
    """S3's sequencer, which orders the events of one object (see `is_before`); None for other formats."""


@dataclass(frozen=True, slots=True)
class InvalidMessage:
    """A message, or a part of one, that is not a valid submission."""

    error: Malformed
    key: bytes | None
    """The message's own key."""
    original: bytes
    """The value of its dead letter."""


Parsed = tuple[ParsedSubmission | InvalidMessage, ...]
"""The entries in the order of the message. Empty if there is nothing to judge (a deletion, a test event)."""


@dataclass(frozen=True, slots=True)
class _Event:
    """The creation of one object, from any of the event formats."""

    bucket: Any
    key: Any
    version_id: Any
    etag: Any
    sequencer: Any
    time: Any


def parse(message: Message, tenancy: Tenancy = NOT_SEPARATED) -> Parsed:
    """Read one message: 0..`RECORDS_LIMIT` entries. Never raises.

    The tenant of an S3 event, which names none, is the owner of its object.
    """
    document: Any = None
    try:
        document = decode_json(message.value)
        if _is_structured_cloud_event(document):
            return _parse_content(message, _read_cloud_event_data(document), tenancy, envelope=document)
        if message.header("ce_specversion") is not None or message.header("ce-specversion") is not None:
            _check_version(_read_header(message, "specversion"))
        return _parse_content(message, document, tenancy)
    except Malformed as error:
        submission_id = error.submission_id or read_submission_id(document if "uri" in _get_fields(document) else None)
        return (InvalidMessage(Malformed(str(error), submission_id), message.key, message.value),)


def is_before(sequencer: str, other: str) -> bool:
    """Whether the S3 event with `sequencer` came before the one with `other`; both must be of the same object key.

    S3 documents them as hexadecimal text to be compared after padding the shorter one with zeros on the right.
    """
    width = max(len(sequencer), len(other))
    return sequencer.upper().ljust(width, "0") < other.upper().ljust(width, "0")


def _parse_content(message: Message, document: Any, tenancy: Tenancy, envelope: dict[str, Any] | None = None) -> Parsed:
    fields = _get_fields(document)
    if "uri" in fields:
        return (_parse_native(message, document),)
    if "Records" in fields:
        return _parse_notification(message, fields, tenancy, envelope)
    if fields.get("Event") == "s3:TestEvent":
        return ()
    if "detail-type" in fields:
        return _parse_event_bridge(message, fields, tenancy)
    return (_parse_native(message, document),)


def _get_fields(document: Any) -> dict[str, Any]:
    return document if isinstance(document, dict) else {}


# Native


def _parse_native(message: Message, document: Any) -> ParsedSubmission | InvalidMessage:
    try:
        submission = _validate(document, message.timestamp)
    except Malformed as error:
        return InvalidMessage(error, message.key, message.value)
    return ParsedSubmission(submission, message.key or submission.uri.encode(), message.value)


def _validate(document: Any, published_at: datetime) -> Submission:
    submission = Submission.parse(document)
    if submission.submitted_at is None:
        return submission.model_copy(update={"submitted_at": published_at})
    return submission


# CloudEvents


def _is_structured_cloud_event(document: Any) -> bool:
    fields = _get_fields(document)
    return "specversion" in fields and "type" in fields and "uri" not in fields


def _read_cloud_event_data(event: dict[str, Any]) -> Any:
    _check_version(event["specversion"])
    if event.get("data_base64") is not None:
        try:
            return decode_json(b64decode(event["data_base64"], validate=True))
        except (TypeError, ValueError):
            raise Malformed("data_base64: is not base64") from None
    data = event.get("data")
    if data is None:
        raise Malformed("data: is missing in the CloudEvent")
    # A producer that does not declare JSON content sends the JSON text as a string.
    return decode_json(data.encode()) if isinstance(data, str) else data


def _check_version(specversion: Any) -> None:
    if specversion != "1.0" and not (isinstance(specversion, str) and specversion.startswith("1.")):
        raise Malformed("specversion: only CloudEvents 1.x is supported")


def _read_header(message: Message, attribute: str) -> str:
    value = message.header(f"ce_{attribute}") or message.header(f"ce-{attribute}") or b""
    return value.decode(errors="replace").strip().strip('"')


# S3


def _parse_notification(
    message: Message, document: dict[str, Any], tenancy: Tenancy, envelope: dict[str, Any] | None
) -> Parsed:
    records = document["Records"]
    if not isinstance(records, list):
        raise Malformed("Records: must be a list")
    if len(records) > RECORDS_LIMIT:
        raise Malformed(f"Records: more than {RECORDS_LIMIT}")
    originals = _split_original(message, document, records, envelope)
    entries = (
        _parse_record(message, record, original, tenancy) for record, original in zip(records, originals, strict=True)
    )
    return tuple(entry for entry in entries if entry is not None)


def _split_original(
    message: Message, document: dict[str, Any], records: list[Any], envelope: dict[str, Any] | None
) -> Iterable[bytes]:
    """The same message once for each record, holding only that record."""
    if len(records) == 1:
        return (message.value,)
    around = _drop_if_large({name: value for name, value in document.items() if name != "Records"})
    if envelope is None:
        return (_encode(around | {"Records": [record]}) for record in records)
    attributes = _drop_if_large(
        {name: value for name, value in envelope.items() if name not in ("data", "data_base64")}
    )
    event = attributes or {"specversion": "1.0", "type": "s3"}
    return (_encode(event | {"data": around | {"Records": [record]}}) for record in records)


def _drop_if_large(fields: dict[str, Any]) -> dict[str, Any]:
    return fields if len(_encode(fields)) <= _ENVELOPE_LIMIT_BYTES else {}


def _encode(document: dict[str, Any]) -> bytes:
    return to_json(document, inf_nan_mode="null")


def _parse_record(
    message: Message, record: Any, original: bytes, tenancy: Tenancy
) -> ParsedSubmission | InvalidMessage | None:
    """The entry of one record; None when it reports something other than a creation."""
    try:
        event = _read_creation_event(record)
        return _build_submission(message, event, original, tenancy) if event else None
    except Malformed as error:
        return InvalidMessage(error, message.key, original)


def _read_creation_event(record: Any) -> _Event | None:
    if not isinstance(record, dict):
        raise Malformed("Records: a record is not an object")
    name = record.get("eventName")
    if not isinstance(name, str):
        raise Malformed("eventName: must be a string")
    if not name.removeprefix("s3:").startswith("ObjectCreated"):
        return None
    s3 = _require_object(record, "s3")
    stored = _require_object(s3, "object")
    return _Event(
        bucket=_require_object(s3, "bucket").get("name"),
        key=_decode_key(stored.get("key")),
        version_id=stored.get("versionId"),
        etag=stored.get("eTag"),
        sequencer=stored.get("sequencer"),
        time=record.get("eventTime"),
    )


def _parse_event_bridge(message: Message, document: dict[str, Any], tenancy: Tenancy) -> Parsed:
    """The format of Amazon EventBridge. Unlike in a notification, keys are not URL-encoded."""
    if document["detail-type"] != "Object Created":
        if document.get("source") == "aws.s3":
            return ()
        raise Malformed("detail-type: not an S3 event")
    detail = _require_object(document, "detail")
    stored = _require_object(detail, "object")
    event = _Event(
        bucket=_require_object(detail, "bucket").get("name"),
        key=stored.get("key"),
        version_id=stored.get("version-id"),
        etag=stored.get("etag"),
        sequencer=stored.get("sequencer"),
        time=document.get("time"),
    )
    return (_build_submission(message, event, message.value, tenancy),)


def _build_submission(message: Message, event: _Event, original: bytes, tenancy: Tenancy) -> ParsedSubmission:
    bucket = _read_text("bucket.name", event.bucket)
    key = _read_text("object.key", event.key)
    if not bucket or not key:
        raise Malformed("bucket.name and object.key: must not be empty")
    if "/" in bucket:
        # In the URI the part after the slash would belong to the key, so it would name another bucket.
        raise Malformed("bucket.name: must not contain a slash")
    version_id, etag, sequencer = (
        _read_text(name, value) or None
        for name, value in (
            ("object.versionId", event.version_id),
            ("object.eTag", event.etag),
            ("object.sequencer", event.sequencer),
        )
    )
    document = {
        "id": make_s3_submission_id(f"{bucket}/{key}", version_id or sequencer or etag),
        "uri": f"s3://{bucket}/{key}",
        "version_id": version_id,
        "etag": etag,
        "tenant": tenancy.find_owner(bucket, key),
        "submitted_at": _read_text("eventTime", event.time) or None,
    }
    submission = _validate(document, message.timestamp)
    return ParsedSubmission(submission, message.key or submission.uri.encode(), original, sequencer)


def _require_object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise Malformed(f"{name}: must be an object")
    return value


def _read_text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{name}: must be a string")
    return value


def _decode_key(key: Any) -> str:
    try:
        return unquote_plus(_read_text("object.key", key), errors="strict")
    except UnicodeDecodeError:
        raise Malformed("object.key: is not URL-encoded UTF-8") from None
