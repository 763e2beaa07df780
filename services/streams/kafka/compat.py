"""Header names that are not UTF-8 must not stop a consumer.

Kafka's brokers take any bytes for the name of a header; kafka-python 3.0.12 raises in the middle of a batch when they
are not UTF-8 and its `poll` then never returns, so one such record would stop every member that meets it. Here such a
record is parsed once more, and what cannot be decoded becomes `\\xNN`.
"""

from typing import Any

from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

_strict: Any = DefaultRecordBatch._read_msg


def _read_msg(batch: Any) -> Any:
    try:
        return _strict(batch)
    except UnicodeDecodeError:
        return _read_leniently(batch)


def _read_leniently(batch: Any) -> Any:
    """One record in message format 2, see https://kafka.apache.org/documentation/#record."""
    buffer = batch._buffer
    length, position = decode_varint(buffer, batch._pos)
    end = position + length
    position += 1  # attributes
    delta, position = decode_varint(buffer, position)
    offset, position = decode_varint(buffer, position)

    def read_bytes() -> bytes | None:
        nonlocal position
        size, position = decode_varint(buffer, position)
        if size < 0:
            return None
        position += size
        return bytes(buffer[position - size : position])

    key, value = read_bytes(), read_bytes()
    count, position = decode_varint(buffer, position)
    headers = [((read_bytes() or b"").decode(errors="backslashreplace"), read_bytes()) for _ in range(count)]
    batch._pos = end
    appended = batch.timestamp_type == batch.LOG_APPEND_TIME
    timestamp = batch.max_timestamp if appended else batch.first_timestamp + delta
    return DefaultRecord(length, batch.base_offset + offset, timestamp, batch.timestamp_type, key, value, headers)


def patch_header_decoding() -> None:
    """From now on, in this process. Does nothing the second time."""
    DefaultRecordBatch._read_msg = _read_msg
