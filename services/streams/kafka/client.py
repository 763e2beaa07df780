"""Shared by all Kafka clients: their options, the topics to create, and the conversion of records to messages."""

import contextlib
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import kafka
from kafka import errors

from services.core.errors import ConfigurationError, StreamUnavailable
from services.core.retry import backoff
from services.streams.base import Message
from services.streams.config import StreamConfig
from services.streams.kafka.compat import end_sender, patch_header_decoding

log = logging.getLogger(__name__)

CONNECT_S: Final = 15.0
"""How long opening waits for a broker before it gives up."""

MAX_BACKOFF_S: Final = 5.0
"""The longest pause between tries while the brokers are unavailable."""

_DEAD_LETTER_LIMIT_BYTES: Final = 2 << 20
"""A dead letter is a whole original message (up to 1 MiB by default) and its headers."""

REQUEST_LIMIT_BYTES: Final = 16 << 20
"""Before compression. It is high, so that the limits of the broker and the topic decide."""

_RESERVED_OPTIONS: Final = frozenset(
    {
        "acks",
        "auto_offset_reset",
        "bootstrap_servers",
        "enable_auto_commit",
        "enable_idempotence",
        "group_id",
        "group_instance_id",
        "isolation_level",
        "key_deserializer",
        "key_serializer",
        "max_poll_records",
        "partition_assignment_strategy",
        "partitioner",
        "transactional_id",
        "value_deserializer",
        "value_serializer",
    }
)
"""Options that SLUICE_KAFKA_OPTIONS must not set: Sluice's guarantees depend on them."""

REJECTED_RECORD_ERRORS: Final = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidRecordError,
    errors.InvalidTopicError,
    ValueError,
    TypeError,
)
"""Errors caused by the record itself: sending it again cannot help."""


def parse_bootstrap_servers(url: str) -> list[str]:
    """The brokers in `kafka://host:9092,host:9092`. The port may be left out.

    Raises:
        ConfigurationError: the URL has another form.
    """
    servers = []
    for server in url.removeprefix("kafka://").rstrip("/").split(","):
        host, colon, port = server.strip().rpartition(":")
        if not colon or port.endswith("]"):
            host, port = server.strip(), "9092"
        if not host or any(mark in host for mark in "/@ ?") or not (port.isascii() and port.isdigit()):
            raise ConfigurationError(f"SLUICE_STREAM_URL must look like kafka://host:9092,host:9092, not {url!r}.")
        servers.append(f"{host}:{port}")
    return servers


def build_options(config: StreamConfig, client: type, **ours: Any) -> dict[str, Any]:
    """The keyword arguments for a client: Sluice's own, then the options in SLUICE_KAFKA_OPTIONS that the client has.

    Raises:
        ConfigurationError: an option is reserved, or no client knows it.
    """
    clients = (kafka.KafkaConsumer, kafka.KafkaProducer, kafka.KafkaAdminClient)
    for name in config.kafka_options:
        if name in _RESERVED_OPTIONS:
            raise ConfigurationError(
                f"SLUICE_KAFKA_OPTIONS cannot set {name}: Sluice depends on its own value; remove it."
            )
        if not any(name in each.DEFAULT_CONFIG for each in clients):
            raise ConfigurationError(f"SLUICE_KAFKA_OPTIONS has {name}, which no kafka-python client knows.")
    known: dict[str, Any] = client.DEFAULT_CONFIG  # type: ignore[attr-defined]
    return {
        "bootstrap_servers": parse_bootstrap_servers(config.url),
        "bootstrap_timeout_ms": int(CONNECT_S * 1000),
        "reconnect_backoff_max_ms": 2_000,
        **ours,
        **{name: value for name, value in config.kafka_options.items() if name in known},
    }


def connect(config: StreamConfig, client: Any, **ours: Any) -> Any:
    """Make a kafka-python client. Blocks until a broker answers, up to `CONNECT_S`.

    Raises:
        ConfigurationError: an option, or the credentials, are wrong.
        StreamUnavailable: no broker answers.
    """
    arguments = build_options(config, client, **ours)
    patch_header_decoding()
    try:
        return client(**arguments)
    except (errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError) as error:
        raise ConfigurationError(f"Kafka rejects the credentials in SLUICE_KAFKA_OPTIONS: {error}.") from error
    except (errors.KafkaConfigurationError, ValueError, TypeError, AssertionError) as error:
        raise ConfigurationError(f"SLUICE_KAFKA_OPTIONS is wrong: {error}.") from error
    except (errors.KafkaError, OSError) as error:
        servers = ", ".join(arguments["bootstrap_servers"])
        raise StreamUnavailable(
            f"Kafka at {servers} does not answer; start it or correct SLUICE_STREAM_URL."
        ) from error


def ensure_topics(config: StreamConfig, admin: Any) -> None:
    """Create the topics that do not exist. Blocks. If all exist, it needs no right to create topics.

    Raises:
        ConfigurationError: a topic does not exist and cannot be created.
        StreamUnavailable: the broker became unavailable.
    """
    wanted: dict[str, dict[str, str]] = {
        config.submissions_stream: {},
        config.verdicts_stream: {},
        config.shadow_verdicts_stream: {},
        config.dead_letters_stream: {"max.message.bytes": str(_DEAD_LETTER_LIMIT_BYTES)},
    }
    deadline = time.monotonic() + CONNECT_S
    for delay in backoff(MAX_BACKOFF_S):
        try:
            _create_missing(config.kafka_partitions, wanted, admin)
        except (errors.RetriableError, errors.InvalidReplicationFactorError, OSError) as error:
            # A cluster that is starting has fewer brokers than replicas for a while.
            if time.monotonic() + delay > deadline:
                raise StreamUnavailable(f"Kafka does not create Sluice's topics: {error}.") from error
            time.sleep(delay)
        except errors.KafkaError as error:
            names = ", ".join(wanted)
            raise ConfigurationError(
                f"Kafka does not let Sluice create its topics ({names}): {error}. Create them, or grant the right to."
            ) from error
        else:
            return


def _create_missing(partitions: int, wanted: Mapping[str, Mapping[str, str]], admin: Any) -> None:
    present = {topic["name"] for topic in admin.describe_topics(list(wanted)) if topic["error_code"] == 0}
    for name in wanted.keys() - present:
        # -1 is the broker's default.
        topic = {"num_partitions": partitions, "replication_factor": -1, "configs": wanted[name]}
        with contextlib.suppress(errors.TopicAlreadyExistsError):  # another member has created it meanwhile
            admin.create_topics({name: topic})
    admin.wait_for_topics(list(wanted))


def to_message(record: Any, token: Any = None) -> Message:
    """Convert a ConsumerRecord. A null value or header becomes an empty one."""
    return Message(
        value=record.value or b"",
        key=record.key,
        headers=tuple((name, value or b"") for name, value in record.headers),
        source=f"{record.topic}/{record.partition}/{record.offset}",
        timestamp=datetime.fromtimestamp(max(0, record.timestamp or 0) / 1000, UTC),
        token=token,
    )


def close_producer(producer: Any, timeout_s: float) -> None:
    """Close a producer in any state. Waits up to `timeout_s` for the records that are not acknowledged yet."""
    try:
        producer.close(timeout=timeout_s)
    except errors.KafkaError as error:
        log.warning("closed a producer with messages that are not acknowledged: %s", error)
        end_sender(producer)
