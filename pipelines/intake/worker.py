"""One intake member: receives messages, has their submissions judged, settles them."""

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from pipelines.intake.crash_isolation import MAX_CRASHES, CrashIsolation, poison_error
from pipelines.intake.key_order import KeyOrder, KeyTicket, LatestEvents
from services.core import telemetry
from services.core.errors import (
    ConfigurationError,
    Expired,
    Forbidden,
    GuardFailed,
    NotFound,
    NotOwned,
    Unjudgeable,
    UnknownPolicy,
)
from services.core.messages import DeadLetter, attempts_before, producer_headers
from services.core.retry import FailureBudget
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.core.values import Priority
from services.moderation.moderator import Moderation, ModerationResult
from services.moderation.verdicts import skipped_verdict
from services.policies.traffic_sample import TrafficSample
from services.streams.base import GroupConsumer, Lag, Message, OutgoingMessage
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse

_RECEIVE_S: Final = 0.5
_WATCH_S: Final = 1.0
_LAG_EVERY_S: Final = 1.0
_DETAIL_LIMIT: Final = 500
_PAUSES_AFTER_FAULT_S: Final = (1, 5, 30)
_HELD_LIMIT: Final = 32_768
"""Messages of one stream that are judged and not settled, so that streams which take no outputs cost no more memory
than this. More than the windows of several Kafka partitions, or a message that holds one up would never show."""
_DOUBT_S: Final = 15.0
"""How long a submission waits that cannot be judged, while nothing else can be either."""

_DOUBTFUL: Final = (Forbidden, NotFound, UnknownPolicy, GuardFailed)
"""What a wrong setting or a broken part makes of every submission, not only of those that deserve it."""
_DOUBTFUL_IN_A_ROW: Final = 500
_DOUBTFUL_PER_SUCCESS: Final = 10.0

log = logging.getLogger(__name__)


class _Work:
    """One message that this member holds."""

    def __init__(self, message: Message, crashes: int) -> None:
        self.message = replace(message, attempts=crashes + 1) if crashes >= message.attempts else message
        self.crashes = crashes
        self.since = time.monotonic()
        self.judged = False
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Blocked(Exception):
    """The message was given up, because it holds up too many others."""


class Lane:
    """The messages of one stream: a bounded number at a time, in order where they share a key."""

    def __init__(self, transport: GroupConsumer, intake: "Intake", limit: int, priority: Priority) -> None:
        self.transport = transport
        self.priority = priority
        self.works: dict[str, _Work] = {}
        """By the messages' sources; the last one, where a message came several times."""
        self.handling: set[asyncio.Task[None]] = set()
        self._intake = intake
        self._limit = limit
        self._judging = 0
        """Messages whose outputs are not there yet. Those that only wait to be settled do not count: under
        exactly-once delivery they wait for the oldest one of their partition."""
        self._judged = asyncio.Event()
        self._slots = asyncio.Semaphore(limit)
        self._key_order = KeyOrder()
        self._latest = LatestEvents()

    @property
    def room(self) -> int:
        """How many more messages may be worked on."""
        return min(self._limit - self._judging, _HELD_LIMIT - len(self.handling))

    async def receive(self) -> None:
        """Take what there is room for and start to work on it; wait a little where there is none."""
        if self.room < 1:
            self._judged.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._judged.wait(), _RECEIVE_S)
            return
        messages = await self.transport.receive(self.room, _RECEIVE_S)
        self._judging += len(messages)
        crashes = await self._intake.isolation.register([message.source for message in messages])
        for work in map(_Work, messages, crashes):
            self.works[work.message.source] = work
            entries = await self._read(work)
            accepted = [entry for entry in entries if isinstance(entry, ParsedSubmission)]
            for entry in accepted:
                self._latest.add(entry)
            ticket = self._key_order.enqueue(entry.key for entry in accepted)
            task = asyncio.create_task(self._handle(work, entries, ticket), name=work.message.source)
            self.handling.add(task)
            task.add_done_callback(self.handling.discard)

    def give_up_blockers(self, deadline_s: float, give_ups: FailureBudget) -> None:
        """End those messages that have held up a full window for `deadline_s`."""
        for message in self.transport.blocked():
            work = self.works.get(message.source)
            late = work is not None and time.monotonic() - work.since > deadline_s
            if work and late and not work.given_up.done() and give_ups.take():
                log.error("%s holds up its partition, it is given up", message.source)
                work.given_up.set_result(None)

    async def _read(self, work: _Work) -> Sequence[ParsedSubmission | InvalidMessage]:
        if work.crashes == 0:
            return parse(work.message)
        if work.crashes >= MAX_CRASHES:
            return ()
        async with self._intake.isolation.isolated(work.message.source, work.crashes, parse=True):
            return parse(work.message)

    async def _handle(
        self, work: _Work, entries: Sequence[ParsedSubmission | InvalidMessage], ticket: KeyTicket
    ) -> None:
        try:
            await self._key_order.wait(ticket)
            await self._settle(work, entries)
        finally:
            self._is_judged(work)
            self._key_order.release(ticket)
            source = work.message.source
            if self.works.get(source) is work:  # else it has come again since, because it was lost in between
                del self.works[source]

    def _is_judged(self, work: _Work) -> None:
        if not work.judged:
            work.judged = True
            self._intake.isolation.release(work.message.source)
            self._judging -= 1
            self._judged.set()

    async def _settle(self, work: _Work, entries: Sequence[ParsedSubmission | InvalidMessage]) -> None:
        message = work.message
        for pause_s in itertools.chain(_PAUSES_AFTER_FAULT_S, itertools.repeat(_PAUSES_AFTER_FAULT_S[-1])):
            try:
                outputs = await self._outputs(work, entries)
                self._is_judged(work)
                await self.transport.settle(message, outputs)
                return
            except NotOwned:
                log.info("%s went to another member", message.source)
                return
            except ConfigurationError as error:
                log.error("%s cannot be settled, next try in %d s: %s", message.source, pause_s, error)
            except Exception:
                # A fault of Sluice itself must cost neither this message nor the others.
                log.exception("%s could not be handled, next try in %d s", message.source, pause_s)
            if work.given_up.done():
                await asyncio.sleep(pause_s)
            else:
                await asyncio.wait({work.given_up}, timeout=pause_s)

    async def _outputs(
        self, work: _Work, entries: Sequence[ParsedSubmission | InvalidMessage]
    ) -> list[OutgoingMessage]:
        """The outputs of all entries; those with the same key one after the other."""
        if work.crashes >= MAX_CRASHES:
            return [self._intake.dead_letter(work.message, work.message.value, poison_error(), None)]
        lines: defaultdict[bytes | None, list[ParsedSubmission | InvalidMessage]] = defaultdict(list)
        for entry in entries:
            lines[entry.key if isinstance(entry, ParsedSubmission) else None].append(entry)

        async def in_turn(line: list[ParsedSubmission | InvalidMessage]) -> list[OutgoingMessage]:
            return [record for entry in line for record in await self._conclude(work, entry)]

        async with self._intake.isolation.isolated(work.message.source, work.crashes):
            ended = await asyncio.gather(*map(in_turn, lines.values()))
        return [record for records in ended for record in records]

    async def _conclude(self, work: _Work, entry: ParsedSubmission | InvalidMessage) -> list[OutgoingMessage]:
        if isinstance(entry, InvalidMessage):
            return [self._intake.dead_letter(work.message, entry.original, entry.error, entry.error.submission_id)]
        if self.priority == "backfill":
            entry = ParsedSubmission(
                entry.submission.model_copy(update={"priority": "backfill"}), entry.key, entry.original, entry.sequencer
            )
        async with self._slots:
            if self._latest.is_stale(entry):
                return self._intake.verdicts(entry, ModerationResult(skipped_verdict(entry.submission, "superseded")))
            return await self._intake.conclude(work, entry)


class Intake:
    """Keeps a bounded number of submissions in flight between the streams and the moderation path.

    A message is settled once, with the outputs of all its submissions. Whatever is not settled when the member ends
    comes back to another one. The stream of backfill is read when less than half of the live lane is taken.
    """

    def __init__(
        self,
        transport: GroupConsumer,
        moderation: Moderation,
        settings: Settings,
        isolation: CrashIsolation,
        sample: TrafficSample | None = None,
        backfill: GroupConsumer | None = None,
    ) -> None:
        self.isolation = isolation
        self._moderation = moderation
        self._settings = settings
        self._sample = sample
        self._live = Lane(transport, self, settings.in_flight, "live")
        self._lanes = [self._live]
        if backfill:
            self._lanes.append(Lane(backfill, self, max(1, settings.in_flight // 2), "backfill"))
        self._give_ups = FailureBudget()
        self._doubtful = FailureBudget(_DOUBTFUL_PER_SUCCESS, _DOUBTFUL_IN_A_ROW, _DOUBTFUL_IN_A_ROW)
        self.lags: dict[Priority, Lag] = {}
        """The newest reading of each stream; none where it could not be read."""
        self._draining = False
        self._drained: asyncio.Task[None] | None = None
        self._receiving = [asyncio.create_task(self._receive(lane)) for lane in self._lanes]
        self._watching = [asyncio.create_task(self._report_lag()), asyncio.create_task(self._watch())]

    def check(self) -> None:
        """Raise what made the member stop receiving, if anything did."""
        for task in self._receiving:
            if task.done() and not self._draining:
                task.result()
                raise RuntimeError("intake stopped receiving")

    async def drain(self) -> None:
        """Receive no more, finish what is in flight within `drain_s`, then leave the groups. Safe to repeat."""
        self._draining = True
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)  # whoever asked for it may not wait for its end

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._settings.drain_s
        await asyncio.gather(*map(cancel_and_wait, self._watching))
        _, waiting = await asyncio.wait(self._receiving, timeout=self._settings.drain_s)
        for task in waiting:  # for a message that may only be read while no other is worked on
            task.cancel()
        if handling := set().union(*(lane.handling for lane in self._lanes)):
            _, late = await asyncio.wait(handling, timeout=max(0.0, deadline - time.monotonic()))
            if late:
                log.warning("%d submissions are left to other members: they were not judged in time", len(late))
                await asyncio.gather(*map(cancel_and_wait, late))
        await asyncio.gather(*(lane.transport.close() for lane in self._lanes))

    async def conclude(self, work: _Work, entry: ParsedSubmission) -> list[OutgoingMessage]:
        """The outputs of one submission: its verdict, and a shadow's where there is one, or its dead letter."""
        submission = entry.submission
        while True:
            try:
                judgement = await self._judge(work, entry)
            except _Blocked:
                if self._settings.blocked_as == "needs_review":
                    verdict = skipped_verdict(submission, "needs_review", reason="blocked", action="review")
                    return self.verdicts(entry, ModerationResult(verdict))
                error = Expired(f"it held up its partition for {self._settings.blocked_deadline_s:g} s")
                return [self.dead_letter(work.message, entry.original, error, submission.id)]
            except Unjudgeable as error:
                if not isinstance(error, _DOUBTFUL) or self._doubtful.take():
                    return [self.dead_letter(work.message, entry.original, error, submission.id)]
                # A wrong bucket policy or a broken checkpoint must not empty the stream into the dead letters.
                log.error("nothing can be judged any more, so submission %s waits: %s", submission.id, error)
                telemetry.count_retry(error)
                await asyncio.wait({work.given_up}, timeout=_DOUBT_S)
            else:
                self._give_ups.succeeded()
                self._doubtful.succeeded()
                return self.verdicts(entry, judgement)

    async def _judge(self, work: _Work, entry: ParsedSubmission) -> ModerationResult:
        """
        Raises:
            _Blocked: the message was given up.
            Expired: the submission could not be judged in time, while others were.
            Unjudgeable: it never can be.
        """
        judging = asyncio.ensure_future(self._moderation.judge(entry.submission))
        either: set[asyncio.Future[Any]] = {judging, work.given_up}
        patience_s = self._settings.judge_deadline_s
        try:
            while True:
                await asyncio.wait(either, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if judging.done():
                    return judging.result()
                if work.given_up.done():
                    raise _Blocked
                if self._give_ups.take():
                    raise Expired(
                        f"it could not be judged within {self._settings.judge_deadline_s:g} s, while others were"
                    )
                patience_s = _DOUBT_S
        finally:
            await cancel_and_wait(judging)

    def verdicts(self, entry: ParsedSubmission, judgement: ModerationResult) -> list[OutgoingMessage]:
        """The records of a judgement."""
        verdict, shadow = judgement.verdict, judgement.shadow
        telemetry.count_result(verdict.outcome, verdict.reason)
        if self._sample:
            self._sample.add(verdict)
        records = [OutgoingMessage(self._settings.verdicts_stream, verdict.model_dump_json().encode(), entry.key)]
        if shadow:
            records.append(
                OutgoingMessage(self._settings.shadow_verdicts_stream, shadow.model_dump_json().encode(), entry.key)
            )
        return records

    def dead_letter(
        self, message: Message, original: bytes, error: Unjudgeable, submission_id: str | None
    ) -> OutgoingMessage:
        """The record of a submission that can never be judged."""
        letter = DeadLetter(
            submission_id=submission_id,
            reason=error.reason,
            detail=" ".join(str(error).split())[:_DETAIL_LIMIT],
            attempts=message.attempts + attempts_before(message.headers),
            source=message.source,
            failed_at=datetime.now(UTC),
        )
        telemetry.count_result("dead_letter", letter.reason)
        log.info("submission %s is a dead letter: %s", submission_id, letter.reason)
        headers = (*letter.headers(), *producer_headers(message.headers))
        return OutgoingMessage(self._settings.dead_letters_stream, original, message.key, headers)

    async def _receive(self, lane: Lane) -> None:
        while not self._draining:
            if lane is not self._live and self._live.room < self._settings.in_flight / 2:
                await asyncio.sleep(_RECEIVE_S)
                continue
            await lane.receive()
            telemetry.IN_FLIGHT.set(sum(len(each.handling) for each in self._lanes))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            for lane in self._lanes:
                lane.give_up_blockers(self._settings.blocked_deadline_s, self._give_ups)

    async def _report_lag(self) -> None:
        while True:
            for lane in self._lanes:
                try:
                    self.lags[lane.priority] = lag = await lane.transport.lag()
                except Exception as error:  # noqa: BLE001 - whatever it is, the next look may be luckier
                    self.lags.pop(lane.priority, None)
                    log.warning("the lag is not known: %s", error)
                    continue
                for partition, waiting in lag.by_partition.items():
                    telemetry.LAG.set(waiting, {"priority": lane.priority, "partition": str(partition)})
            await asyncio.sleep(_LAG_EVERY_S)
