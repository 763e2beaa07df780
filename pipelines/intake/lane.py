"""One stream of an intake member: it receives messages, has them processed in order, and settles them."""

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final

from pipelines.intake.crash_isolation import CrashIsolation, find_poison_error
from pipelines.intake.key_order import KeyOrder, KeyTicket, LatestEvents, ReceivedEvent
from pipelines.intake.processor import Processor
from pipelines.intake.replayed_attempts import ReplayedAttempts
from services.core.errors import ConfigurationError, NotFound, NotOwned, ObjectChanged, Unjudgeable
from services.core.values import Priority
from services.moderation.moderator import ModerationResult
from services.streams.base import GroupConsumer, Message, OutgoingMessage
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse

RECEIVE_TIMEOUT_S: Final = 0.5
"""The longest wait for messages or for a free slot."""
_RETRY_PAUSES_S: Final = (1, 5, 30)
"""Pauses between tries to settle a message. The last one repeats."""
_MAX_UNSETTLED_MESSAGES: Final = 32_768
"""Messages of one stream that are judged and not settled. The limit bounds the memory while the stream accepts no
output. It is larger than the windows of several Kafka partitions, so a message that blocks one of them is detected."""
_LATER_EVENTS_LIMIT: Final = 3
"""Later events of an object that are judged in the turn of an earlier one, so that made-up events do not delay it."""

Entry = ParsedSubmission | InvalidMessage

log = logging.getLogger(__name__)


class InFlightMessage:
    """One message that this member has received and not settled."""

    def __init__(self, message: Message, crashes: int, received_at_s: float, *, earlier_attempts: int = 0) -> None:
        """`earlier_attempts`: the tries of a replayed submission before it became a dead letter."""
        self.message = replace(message, attempts=max(message.attempts, crashes + 1) + earlier_attempts)
        self.crashes = crashes
        self.received_at_s = received_at_s
        self.judged = False
        self.blocked_deadline_passed = False
        self.events: dict[int, ReceivedEvent] = {}
        """The S3 events among the entries, by their position."""
        self._scope: asyncio.Timeout | None = None

    def may_be_judged_early(self) -> bool:
        """Whether its S3 events may be judged in the turn of another message. A message that crashed a member may not:
        the other one would be blamed."""
        return self.crashes == 0 and not self.blocked_deadline_passed

    def stop_processing(self) -> None:
        """Stop processing the message, now and in later tries. It is still settled."""
        if self._scope and not self.blocked_deadline_passed:
            self._scope.reschedule(asyncio.get_running_loop().time())
        self.blocked_deadline_passed = True

    @asynccontextmanager
    async def stop_on_request(self) -> AsyncIterator[None]:
        """Run the block until it ends or `stop_processing` is called. `stop_processing` raises nothing here."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scope = scope
                yield
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._scope = None


class Lane:
    """The messages of one stream: a bounded number at a time, in order where they share a key."""

    def __init__(
        self,
        consumer: GroupConsumer,
        processor: Processor,
        isolation: CrashIsolation,
        max_unjudged: int,
        priority: Priority,
        replayed_attempts: ReplayedAttempts | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`max_unjudged` messages are processed at a time. Tests pass their own `clock` and `sleep`.

        Without `replayed_attempts`, the tries of replayed submissions start at 0.
        """
        self.consumer = consumer
        self.priority = priority
        self.in_flight: dict[str, InFlightMessage] = {}
        """By source. If a message was received several times, this is the last one."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._processor = processor
        self._isolation = isolation
        self._replayed_attempts = replayed_attempts
        self._max_unjudged = max_unjudged
        self._clock = clock
        self._sleep = sleep
        self._unjudged_count = 0
        """The number of messages without outputs: parsed, waiting or being judged. Messages that wait to be settled do
        not count: with exactly-once delivery they wait for the oldest message of their partition."""
        self._judged = asyncio.Event()
        self._slots = asyncio.Semaphore(max_unjudged)
        self._key_order = KeyOrder()
        self._latest_events = LatestEvents()

    @property
    def capacity(self) -> int:
        """How many more messages may be received now."""
        return min(self._max_unjudged - self._unjudged_count, _MAX_UNSETTLED_MESSAGES - len(self.tasks))

    async def receive(self) -> None:
        """Receive as many messages as there is capacity for, and start to process them."""
        if self.capacity < 1:
            self._judged.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._judged.wait(), RECEIVE_TIMEOUT_S)
            return
        messages = await self.consumer.receive(self.capacity, RECEIVE_TIMEOUT_S)
        self._unjudged_count += len(messages)
        crashes = await self._isolation.register([message.source for message in messages])
        earlier = await self._replayed_attempts.find(messages) if self._replayed_attempts else [0] * len(messages)
        for message, count, attempts in zip(messages, crashes, earlier, strict=True):
            in_flight = InFlightMessage(message, count, self._clock(), earlier_attempts=attempts)
            self.in_flight[in_flight.message.source] = in_flight
            entries = await self._parse(in_flight)
            submissions = [entry for entry in entries if isinstance(entry, ParsedSubmission)]
            self._add_events(in_flight, entries)
            ticket = self._key_order.enqueue(entry.key for entry in submissions)
            task = asyncio.create_task(self._handle(in_flight, entries, ticket), name=in_flight.message.source)
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def stop_head_of_line_messages(self, deadline_s: float) -> None:
        """Stop processing messages that block a partition and were received more than `deadline_s` ago.

        A message blocks its partition if the rest of a full window waits for it.
        """
        for message in self.consumer.find_head_of_line_messages():
            in_flight = self.in_flight.get(message.source)
            if (
                in_flight is None
                or in_flight.blocked_deadline_passed
                or self._clock() - in_flight.received_at_s <= deadline_s
            ):
                continue
            if self._processor.expiry_budget.take():
                log.error(
                    "message %s blocks its partition more than %g s after its receipt; "
                    "it is settled without a judgement",
                    *(message.source, deadline_s),
                )
                in_flight.stop_processing()

    async def _parse(self, in_flight: InFlightMessage) -> Sequence[Entry]:
        if in_flight.crashes == 0:
            return parse(in_flight.message, self._processor.tenancy)
        if find_poison_error(in_flight.crashes) is not None:
            return ()
        async with self._isolation.isolate(in_flight.message.source, in_flight.crashes, parse=True):
            return parse(in_flight.message, self._processor.tenancy)

    async def _handle(self, in_flight: InFlightMessage, entries: Sequence[Entry], ticket: KeyTicket) -> None:
        try:
            await self._key_order.wait(ticket)
            await self._publish_and_settle(in_flight, entries)
        finally:
            self._mark_judged(in_flight)
            for event in in_flight.events.values():
                self._latest_events.remove(event)
            self._key_order.release(ticket)
            source = in_flight.message.source
            if self.in_flight.get(source) is in_flight:  # otherwise the message was revoked and received again
                del self.in_flight[source]

    def _mark_judged(self, in_flight: InFlightMessage) -> None:
        if not in_flight.judged:
            in_flight.judged = True
            self._isolation.release(in_flight.message.source)
            self._unjudged_count -= 1
            self._judged.set()

    async def _publish_and_settle(self, in_flight: InFlightMessage, entries: Sequence[Entry]) -> None:
        message = in_flight.message
        for pause_s in itertools.chain(_RETRY_PAUSES_S, itertools.repeat(_RETRY_PAUSES_S[-1])):
            try:
                outputs = await self._process_entries(in_flight, entries)
                self._mark_judged(in_flight)
                await self.consumer.settle(message, outputs)
                return
            except NotOwned:
                log.info("message %s now belongs to another member; it is dropped here", message.source)
                return
            except ConfigurationError as error:
                log.error("cannot settle message %s; next try in %d s: %s", message.source, pause_s, error)
            except Exception:
                # A defect of Sluice must cost neither this message nor the others.
                log.exception("a defect of Sluice stopped message %s; next try in %d s", message.source, pause_s)
            await self._sleep(pause_s)

    async def _process_entries(self, in_flight: InFlightMessage, entries: Sequence[Entry]) -> list[OutgoingMessage]:
        """Return the outputs of all entries. Entries with the same key are processed one after the other."""
        poison_error = find_poison_error(in_flight.crashes)
        if poison_error is not None:  # a poison message ends here; see pipelines.intake.crash_isolation
            return [self._processor.make_dead_letter(in_flight.message, in_flight.message.value, poison_error, None)]
        by_key: defaultdict[bytes | None, list[int]] = defaultdict(list)
        for number, entry in enumerate(entries):
            by_key[entry.key if isinstance(entry, ParsedSubmission) else None].append(number)
        outputs: dict[int, list[OutgoingMessage]] = {}

        async def run_key(numbers: list[int]) -> None:
            for number in numbers:
                outputs[number] = await self._process(in_flight, entries[number], number)

        if not in_flight.blocked_deadline_passed:
            async with (
                in_flight.stop_on_request(),
                self._isolation.isolate(in_flight.message.source, in_flight.crashes),
            ):
                await asyncio.gather(*map(run_key, by_key.values()))
        for number in range(len(entries)):
            if number not in outputs:
                outputs[number] = self._make_outcome_of_blocked(in_flight, entries[number], number)
        return [output for numbers in by_key.values() for number in numbers for output in outputs[number]]

    def _add_events(self, in_flight: InFlightMessage, entries: Sequence[Entry]) -> None:
        for number, entry in enumerate(entries):
            if isinstance(entry, ParsedSubmission) and entry.sequencer is not None:
                event = ReceivedEvent(self._set_priority(entry), self._clock(), in_flight.may_be_judged_early)
                in_flight.events[number] = event
                self._latest_events.add(event)

    def _set_priority(self, entry: ParsedSubmission) -> ParsedSubmission:
        if self.priority != "backfill":
            return entry
        return replace(entry, submission=entry.submission.model_copy(update={"priority": "backfill"}))

    async def _process(self, in_flight: InFlightMessage, entry: Entry, number: int) -> list[OutgoingMessage]:
        message, event = in_flight.message, in_flight.events.get(number)
        if isinstance(entry, InvalidMessage):
            return self._processor.reject(message, entry)
        if event is None:
            async with self._slots:
                return await self._processor.process(message, self._set_priority(entry))
        if in_flight.may_be_judged_early():  # else this message is a suspect, and must run without others
            await self._judge_later_events(event)
        result: ModerationResult | Unjudgeable | None = None
        async with event.lock:
            self._latest_events.remove(event)
            result, event.result = event.result, None
            if result is None and not await self._is_superseded(event):
                result = await self._judge_event(event)
        if result is None or (
            # The object was overwritten or deleted, and the event of a later one was judged.
            isinstance(result, ObjectChanged | NotFound) and self._latest_events.has_judged_later(event.entry)
        ):
            return self._processor.make_superseded_verdict(event.entry)
        return self._processor.make_outcome(message, event.entry, result)

    async def _judge_later_events(self, event: ReceivedEvent) -> None:
        """Judge later events of the same object first, until one of them supersedes this event.

        Only a judged event supersedes, but it has the same key, so its own turn comes after this one's.
        """
        for _ in range(_LATER_EVENTS_LIMIT):
            latest = self._latest_events
            if event.result or latest.is_superseded(event) or latest.is_superseded_unless_current(event):
                return
            later = self._latest_events.find_later(event)
            if later is None:
                return
            # Locks are taken one at a time, and a holder waits for nothing but slots and backends.
            async with later.lock:
                if later.result is None and later.is_eligible():
                    later.result = await self._judge_event(later)
                self._latest_events.remove(later)

    async def _is_superseded(self, event: ReceivedEvent) -> bool:
        if self._latest_events.is_superseded(event):
            return True
        if not self._latest_events.is_superseded_unless_current(event):
            return False
        async with self._slots:
            return await self._processor.is_replaced(event.entry)

    async def _judge_event(self, event: ReceivedEvent) -> ModerationResult | Unjudgeable:
        async with self._slots:
            began_at_s = self._clock()
            result = await self._processor.judge(event.entry)
        if isinstance(result, ModerationResult):
            self._latest_events.mark_judged(event.entry, result.verdict.etag, began_at_s)
        return result

    def _make_outcome_of_blocked(self, in_flight: InFlightMessage, entry: Entry, number: int) -> list[OutgoingMessage]:
        message, event = in_flight.message, in_flight.events.get(number)
        if isinstance(entry, InvalidMessage):
            return self._processor.reject(message, entry)
        if event and event.result is not None:
            return self._processor.make_outcome(message, event.entry, event.result)
        if event and self._latest_events.is_superseded(event):
            return self._processor.make_superseded_verdict(entry)
        return self._processor.make_blocked_outcome(message, entry)
