"""One intake member: receives messages, has their submissions judged, settles them."""

import asyncio
import itertools
import logging
from datetime import UTC, datetime
from typing import Final

from services import telemetry
from services.contracts import DeadLetter
from services.errors import ConfigurationError, NotOwned, StreamUnavailable, Unjudgeable
from services.moderation import Moderation
from services.policies.sample import Sample
from services.settings import Settings
from services.streams.formats import Accepted, Rejected, parse
from services.streams.transport import Message, Record, Transport

_RECEIVE_S: Final = 0.5
_LAG_EVERY_S: Final = 5.0
_DETAIL_LIMIT: Final = 500
_PAUSES_AFTER_FAULT_S: Final = (1, 5, 30)

log = logging.getLogger(__name__)


class Intake:
    """Keeps a bounded number of submissions in flight between a transport and the moderation path.

    A message is settled once, with the outputs of all its submissions. Whatever is not settled when the member ends
    comes back to another one.
    """

    def __init__(
        self, transport: Transport, moderation: Moderation, settings: Settings, sample: Sample | None = None
    ) -> None:
        self._transport = transport
        self._moderation = moderation
        self._settings = settings
        self._sample = sample
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._handling: set[asyncio.Task[None]] = set()
        self._draining = False
        self._receiving = asyncio.create_task(self._receive())
        self._reporting = asyncio.create_task(self._report_lag())

    def check(self) -> None:
        """Raise what made the member stop receiving, if anything did."""
        if self._receiving.done() and not self._draining:
            self._receiving.result()
            raise RuntimeError("intake stopped receiving")

    async def drain(self) -> None:
        """Receive no more, finish what is in flight within `drain_s`, then leave the group. Safe to repeat."""
        if self._draining:
            await asyncio.wait([self._receiving])
            return
        self._draining = True
        self._reporting.cancel()
        await asyncio.wait([self._receiving])
        if self._handling:
            _, late = await asyncio.wait(self._handling, timeout=self._settings.drain_s)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d submissions are left to other members: they were not judged in time", len(late))
                await asyncio.wait(late)
        await self._transport.close()

    async def _receive(self) -> None:
        while not self._draining:
            free = self._settings.in_flight - len(self._handling)
            if free <= 0:
                await asyncio.wait(self._handling, timeout=_RECEIVE_S, return_when=asyncio.FIRST_COMPLETED)
                continue
            for message in await self._transport.receive(free, _RECEIVE_S):
                task = asyncio.create_task(self._handle(message), name=message.source)
                self._handling.add(task)
                task.add_done_callback(self._handling.discard)
            telemetry.IN_FLIGHT.set(len(self._handling))

    async def _handle(self, message: Message) -> None:
        for pause_s in itertools.chain(_PAUSES_AFTER_FAULT_S, itertools.repeat(_PAUSES_AFTER_FAULT_S[-1])):
            try:
                ends = await asyncio.gather(*(self._conclude(entry, message) for entry in parse(message)))
                await self._transport.settle(message, [record for records in ends for record in records])
                return
            except NotOwned:
                log.info("%s went to another member", message.source)
                return
            except ConfigurationError as error:
                log.error("%s cannot be settled, next try in %d s: %s", message.source, pause_s, error)
            except Exception:
                # A fault of Sluice itself must cost neither this message nor the others.
                log.exception("%s could not be handled, next try in %d s", message.source, pause_s)
            await asyncio.sleep(pause_s)

    async def _conclude(self, entry: Accepted | Rejected, message: Message) -> list[Record]:
        """The outputs of one entry: its verdict, and a shadow's where there is one, or its dead letter."""
        if isinstance(entry, Rejected):
            return [self._dead_letter(entry.original, entry.error, entry.error.submission_id, message)]
        async with self._slots:
            try:
                judgement = await self._moderation.judge(entry.submission)
            except Unjudgeable as error:
                return [self._dead_letter(entry.original, error, entry.submission.id, message)]
        verdict, shadow = judgement.verdict, judgement.shadow
        telemetry.SUBMISSIONS.inc(1, {"end": verdict.outcome, "reason": verdict.reason or ""})
        if self._sample:
            self._sample.add(verdict)
        records = [Record(self._settings.verdicts_stream, verdict.model_dump_json().encode(), entry.key)]
        if shadow:
            records.append(Record(self._settings.shadow_verdicts_stream, shadow.model_dump_json().encode(), entry.key))
        return records

    def _dead_letter(self, original: bytes, error: Unjudgeable, submission_id: str | None, message: Message) -> Record:
        letter = DeadLetter(
            submission_id=submission_id,
            reason=error.reason,
            detail=" ".join(str(error).split())[:_DETAIL_LIMIT],
            attempts=message.attempts,
            source=message.source,
            failed_at=datetime.now(UTC),
        )
        telemetry.SUBMISSIONS.inc(1, {"end": "dead_letter", "reason": letter.reason})
        log.info("submission %s is a dead letter: %s", submission_id, letter.reason)
        return Record(self._settings.dead_letters_stream, original, message.key, letter.headers())

    async def _report_lag(self) -> None:
        while True:
            try:
                for partition, waiting in (await self._transport.lag()).by_partition.items():
                    telemetry.LAG.set(waiting, {"partition": str(partition)})
            except StreamUnavailable as error:
                log.warning("the lag is not known: %s", error)
            await asyncio.sleep(_LAG_EVERY_S)
