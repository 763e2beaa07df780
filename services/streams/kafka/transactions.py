"""Records and offsets in one Kafka transaction: all of them or none, and only if the member
is in the current generation of its group.

kafka-python needs these precautions (`services.streams.kafka.compat` describes its defects):

- Every request of a transaction has a time limit. A producer that does not answer in time is replaced.
- Every record is acknowledged before the offsets are sent.
- A producer is used again only after a transaction that was committed, or that was aborted with every record
  acknowledged and no offsets sent. Otherwise a new producer with the same transactional id replaces it. That ends the
  transaction, and fences every other producer with this id.

When the answer to a commit is lost, its outcome is unknown. The group's committed offsets show it: the transaction
would have committed them together with the records.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final

import kafka
from kafka import errors

from services.core.errors import ConfigurationError, StreamUnavailable
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.kafka import compat
from services.streams.kafka.client import REJECTED_RECORD_ERRORS, REQUEST_LIMIT_BYTES, close_producer, connect
from services.streams.kafka.commits import add_offsets_to_transaction, begin_transaction_commit

log = logging.getLogger(__name__)

_DELIVERY_S: Final = 10.0
_TRANSACTION_S: Final = 10.0
"""The broker aborts an open transaction after this long (it checks every 10 s). Until then the transaction of a killed
member blocks readers and the next owner of its partitions, unless a member with its id starts."""
_ANSWER_S: Final = 15.0
_CHECK_S: Final = 0.1
_RETRY_MS: Final = 20
"""Pause before a retry when the broker has not finished the last transaction."""


class CommitOutcome(Enum):
    """The outcome of a transaction."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    """Nothing was published. A retry can help."""
    REJECTED = "rejected"
    """Nothing was published: a topic rejects at least one of the records."""
    FENCED = "fenced"
    """Nothing was published: the broker has fenced this member, because another one has joined with its id."""
    UNKNOWN = "unknown"
    """There was no answer. After `recover` the committed offsets show the outcome."""


class _RejectedRecord(Exception):
    """A topic rejects a record."""


class TransactionalSender:
    """A transactional producer, one transaction at a time. Every method blocks; `stop` may come from another thread."""

    def __init__(self, config: StreamConfig, transactional_id: str) -> None:
        """Connects, and ends the transaction that an earlier producer with `transactional_id` left open.

        Raises:
            ConfigurationError: an option, or the credentials, are wrong.
            StreamUnavailable: no broker answers.
        """
        self._config = config
        self._id = transactional_id
        self._stopping = threading.Event()
        self._producer: Any = None
        if not self.recover():
            raise StreamUnavailable("Kafka's transaction coordinator does not answer.")

    def publish(
        self, records: Sequence[OutgoingMessage], offsets: Mapping[Any, int], check_ownership: Callable[[], Any | None]
    ) -> tuple[CommitOutcome, str]:
        """Publish `records` and commit `offsets` by partition. Returns the outcome, and the cause of a failure.

        `check_ownership` is called after the records are written. It returns the consumer's group metadata, or None to
        abort the transaction.
        """
        if not self.ready():
            return CommitOutcome.ABORTED, "Kafka does not answer"
        producer = self._producer
        try:
            producer.begin_transaction()
            self._write(producer, records)
            member = check_ownership()
            if member is None:
                self._wait_for_result(compat.begin_abort(producer))
                return CommitOutcome.ABORTED, "a partition went to another member"
            self._wait_for_result(add_offsets_to_transaction(producer, offsets, member))
            commit = begin_transaction_commit(producer)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            self._discard_producer()
            return _failure_outcome(error), _describe(error)
        try:
            self._wait_for_result(commit)
        except Exception as error:  # noqa: BLE001 - likewise; the commit may have succeeded
            self._discard_producer()
            return CommitOutcome.UNKNOWN, _describe(error)
        return CommitOutcome.COMMITTED, ""

    def ready(self) -> bool:
        """Whether there is a producer. If not, it tries to `recover`."""
        return self._producer is not None or self.recover()

    def recover(self) -> bool:
        """Replace the producer, which ends its last transaction. Returns False if no broker answers."""
        self._discard_producer()
        if self._stopping.is_set():
            return False
        producer: Any = None
        try:
            producer = connect(
                self._config,
                kafka.KafkaProducer,
                acks="all",
                transactional_id=self._id,
                compression_type="gzip",
                max_request_size=REQUEST_LIMIT_BYTES,
                max_block_ms=5_000,
                retry_backoff_ms=_RETRY_MS,
                request_timeout_ms=int(_DELIVERY_S * 1000 * 0.6),
                delivery_timeout_ms=int(_DELIVERY_S * 1000),
                transaction_timeout_ms=int(_TRANSACTION_S * 1000),
            )
            producer.init_transactions()
        except (errors.KafkaError, StreamUnavailable) as error:
            log.warning("opening a transactional Kafka producer failed; retrying: %s", _describe(error))
            if producer is not None:
                close_producer(producer, 0)
            if isinstance(error, errors.AuthorizationError):
                raise ConfigurationError(f"Kafka does not let Sluice use the transactional id {self._id}.") from error
            return False
        self._producer = producer
        if self._stopping.is_set():
            self._discard_producer()
        return self._producer is not None

    def stop(self) -> None:
        """End a running call soon, and every later call at once."""
        self._stopping.set()

    def close(self) -> None:
        """Release the connections. An open transaction is aborted by the broker, or by the next owner of the id."""
        self.stop()
        self._discard_producer()

    def _write(self, producer: Any, records: Sequence[OutgoingMessage]) -> None:
        """Returns when every record is acknowledged.

        Raises:
            _RejectedRecord: a topic rejects one of them.
            Exception: one was not acknowledged for another reason.
        """
        failures: list[Exception] = []
        pending = []
        for record in records:
            try:
                pending.append(producer.send(record.stream, record.value, key=record.key, headers=list(record.headers)))
            except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
                failures.append(error)
                break
        deadline = time.monotonic() + _ANSWER_S
        for future in pending:
            try:
                while not future.is_done and time.monotonic() < deadline and not self._stopping.is_set():
                    with contextlib.suppress(errors.KafkaTimeoutError):
                        future.get(timeout=_CHECK_S)
                future.get(timeout=0)
            except Exception as error:  # noqa: BLE001 - likewise
                failures.append(error)
        for failure in failures:
            if isinstance(failure, REJECTED_RECORD_ERRORS):
                raise _RejectedRecord(_describe(failure)) from failure
        if failures:
            raise failures[0]

    def _wait_for_result(self, result: Any) -> None:
        """Wait for a request of the transaction.

        Raises:
            KafkaError: it failed, or there was no answer in time.
        """
        deadline = time.monotonic() + _ANSWER_S
        while not result.wait(timeout_ms=int(_CHECK_S * 1000)):
            if time.monotonic() > deadline or self._stopping.is_set():
                raise errors.KafkaTimeoutError("no answer in time")

    def _discard_producer(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            close_producer(producer, 0)


def _failure_outcome(error: Exception) -> CommitOutcome:
    """The outcome of a transaction that failed before its commit."""
    if isinstance(error, _RejectedRecord):
        return CommitOutcome.REJECTED
    return CommitOutcome.FENCED if isinstance(error, errors.FencedInstanceIdError) else CommitOutcome.ABORTED


def _describe(error: BaseException) -> str:
    if isinstance(error, _RejectedRecord):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
