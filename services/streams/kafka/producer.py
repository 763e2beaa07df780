"""Publishes to Kafka: the producer of at-least-once delivery, and the publisher of the gateway and the commands."""

import asyncio
import concurrent.futures
import logging
from collections.abc import Sequence
from typing import Any, Final, Self

import kafka
from kafka import errors

from services.core.errors import ConfigurationError, StreamUnavailable
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.kafka.client import (
    REJECTED_RECORD_ERRORS,
    REQUEST_LIMIT_BYTES,
    close_producer,
    connect,
    ensure_topics,
)

log = logging.getLogger(__name__)

SENDS_IN_FLIGHT: Final = 256
"""Concurrent calls of `AtLeastOnceSender.send`, per sender. kafka-python buffers records without a limit."""

_PUBLISH_S: Final = 10.0
_CLOSE_S: Final = 3.0


class AtLeastOnceSender:
    """An idempotent producer for an event loop: every send waits for all in-sync replicas."""

    def __init__(self, config: StreamConfig, *, delivery_s: float) -> None:
        """Connects, so it blocks. `delivery_s` is how long one try to send may take, at least 5 s.

        Raises:
            ConfigurationError: an option, or the credentials, are wrong.
            StreamUnavailable: no broker answers.
        """
        self._config = config
        self._delivery_s = delivery_s
        self._slots = asyncio.Semaphore(SENDS_IN_FLIGHT)
        # send() of kafka-python blocks until it knows a topic, so it runs in a thread; in one, to keep the order.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kafka-send")
        self._producer = self._connect()
        self._closed = False

    def _connect(self) -> Any:
        return connect(
            self._config,
            kafka.KafkaProducer,
            acks="all",
            enable_idempotence=True,
            compression_type="gzip",
            max_request_size=REQUEST_LIMIT_BYTES,
            max_block_ms=5_000,
            request_timeout_ms=int(self._delivery_s * 1000 * 0.6),
            delivery_timeout_ms=int(self._delivery_s * 1000),
        )

    async def send(self, records: Sequence[OutgoingMessage]) -> list[OutgoingMessage]:
        """Send and wait. Returns the records that were not acknowledged; until `close` a retry can help.

        Raises:
            ConfigurationError: a topic rejects a record, for example because it is too large for the topic.
        """
        async with self._slots:
            if self._closed or not records:
                return list(records)
            loop = asyncio.get_running_loop()
            producer = self._producer
            futures = await loop.run_in_executor(self._thread, self._append, producer, tuple(records))
            outcomes = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            failed = []
            for record, outcome in zip(records, outcomes, strict=True):
                if not isinstance(outcome, BaseException):
                    continue
                log.warning("a message for %s was not acknowledged; it may be sent again: %s", record.stream, outcome)
                if not isinstance(outcome, errors.RetriableError | errors.AuthorizationError):
                    await loop.run_in_executor(self._thread, self._renew, producer)
                # A rejected record fails every record that the producer holds. Sending each failed record alone shows
                # which one is rejected.
                if not isinstance(outcome, REJECTED_RECORD_ERRORS) or not await loop.run_in_executor(
                    self._thread, self._send_alone, record
                ):
                    failed.append(record)
            return failed

    def _append(self, producer: Any, records: tuple[OutgoingMessage, ...]) -> list["concurrent.futures.Future[None]"]:
        futures = []
        for record in records:
            future: concurrent.futures.Future[None] = concurrent.futures.Future()
            future.set_running_or_notify_cancel()  # so that a cancelled waiter cannot cancel it
            futures.append(future)
            try:
                pending = producer.send(record.stream, record.value, key=record.key, headers=list(record.headers))
            except Exception as error:  # noqa: BLE001 - the caller gets it as the outcome of this record
                future.set_exception(error)
                continue
            pending.add_callback(lambda _, future=future: future.set_result(None))
            pending.add_errback(lambda error, future=future: future.set_exception(error))
        return futures

    def _send_alone(self, record: OutgoingMessage) -> bool:
        producer = self._connect()
        try:
            producer.send(record.stream, record.value, key=record.key, headers=list(record.headers)).get(
                self._delivery_s
            )
        except REJECTED_RECORD_ERRORS as error:
            raise ConfigurationError(
                f"Kafka rejects a message of {len(record.value)} bytes for {record.stream}: {error}. "
                "Raise the topic's max.message.bytes."
            ) from error
        except errors.KafkaError as error:
            log.warning("a message for %s was not acknowledged, sent alone: %s", record.stream, error)
            return False
        finally:
            close_producer(producer, 1)
        return True

    def _renew(self, broken: Any) -> None:
        """Replace a failed producer, which would fail every later record."""
        if self._producer is not broken or self._closed:
            return
        try:
            self._producer = self._connect()
        except (ConfigurationError, StreamUnavailable) as error:
            log.warning("replacing the Kafka producer failed; the next send tries again: %s", error)
            return
        close_producer(broken, 1)

    async def close(self) -> None:
        """Wait up to 3 s for records in flight, then release the connections."""
        if not self._closed:
            self._closed = True
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, close_producer, self._producer, _CLOSE_S)
            self._thread.shutdown(wait=False)


class KafkaPublisher:
    """Publishes without being a member. See `Publisher`."""

    def __init__(self, sender: AtLeastOnceSender) -> None:
        """Use `open`."""
        self._sender = sender

    @classmethod
    async def open(cls, config: StreamConfig) -> Self:
        """Connect, and create the topics that are missing.

        Raises:
            ConfigurationError: an option is wrong, or a topic is missing and may not be created.
            StreamUnavailable: no broker answered in time.
        """

        def make() -> AtLeastOnceSender:
            admin = connect(config, kafka.KafkaAdminClient)
            try:
                ensure_topics(config, admin)
            finally:
                admin.close()
            return AtLeastOnceSender(config, delivery_s=_PUBLISH_S)

        return cls(await asyncio.to_thread(make))

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """Acknowledged by all in-sync replicas. When it raises, some of the records may have been published."""
        failed = await self._sender.send(records)
        if failed:
            raise StreamUnavailable(f"Kafka did not acknowledge {len(failed)} of {len(records)} messages in time.")

    async def close(self) -> None:
        """Release the connections."""
        await self._sender.close()
