"""One intake member: a lane for each stream, which it starts, watches and drains."""

import asyncio
import logging
import time
from typing import Final

from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.lane import RECEIVE_TIMEOUT_S, Lane
from pipelines.intake.processor import Processor
from pipelines.intake.replayed_attempts import ReplayedAttempts
from services.core import telemetry
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.core.values import Priority
from services.moderation.moderator import Moderator
from services.policies.traffic_sample import TrafficSample
from services.streams.base import GroupConsumer, Lag

_WATCH_INTERVAL_S: Final = 1.0
_LAG_INTERVAL_S: Final = 1.0

log = logging.getLogger(__name__)


class IntakeWorker:
    """Keeps a bounded number of submissions in flight between the streams and the moderator.

    A message is settled once, with the outputs of all its submissions. Messages that are not settled when the member
    ends are redelivered to another member. The backfill stream is read while less than half of the live lane is in use.
    """

    def __init__(
        self,
        live: GroupConsumer,
        moderator: Moderator,
        settings: Settings,
        isolation: CrashIsolation,
        sample: TrafficSample | None = None,
        backfill: GroupConsumer | None = None,
        replayed_attempts: ReplayedAttempts | None = None,
    ) -> None:
        self._settings = settings
        processor = Processor(moderator, settings, sample)
        self.live = Lane(live, processor, isolation, settings.in_flight, "live", replayed_attempts)
        self._lanes = [self.live]
        if backfill:
            max_unjudged = max(1, settings.in_flight // 2)
            self._lanes.append(Lane(backfill, processor, isolation, max_unjudged, "backfill", replayed_attempts))
        self.lags: dict[Priority, Lag] = {}
        """The last lag of each stream. A stream whose lag cannot be read is missing."""
        self._draining = False
        self._drained: asyncio.Task[None] | None = None
        self._receiving = [asyncio.create_task(self._receive(lane)) for lane in self._lanes]
        self._watching = [asyncio.create_task(self._report_lag()), asyncio.create_task(self._watch())]

    def check_health(self) -> None:
        """
        Raises:
            Exception: the error that made the worker stop receiving.
        """
        for task in self._receiving:
            if task.done() and not self._draining:
                task.result()
                raise RuntimeError("the intake worker has stopped receiving")

    async def drain(self) -> None:
        """Receive no more messages, finish those in flight within `drain_s`, and leave the groups. Safe to repeat."""
        self._draining = True
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)  # the drain goes on if its caller is cancelled

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._settings.drain_s
        await asyncio.gather(*map(cancel_and_wait, self._watching))
        _, waiting = await asyncio.wait(self._receiving, timeout=self._settings.drain_s)
        for task in waiting:  # it waits to parse a message in isolation
            task.cancel()
        if tasks := set().union(*(lane.tasks for lane in self._lanes)):
            _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.monotonic()))
            if late:
                log.warning(
                    "%d messages were not finished within the drain; other members will receive them", len(late)
                )
                await asyncio.gather(*map(cancel_and_wait, late))
        await asyncio.gather(*(lane.consumer.close() for lane in self._lanes))

    async def _receive(self, lane: Lane) -> None:
        while not self._draining:
            if lane is not self.live and self.live.capacity < self._settings.in_flight / 2:
                await asyncio.sleep(RECEIVE_TIMEOUT_S)
                continue
            await lane.receive()
            telemetry.IN_FLIGHT.set(sum(len(each.tasks) for each in self._lanes))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            for lane in self._lanes:
                lane.stop_head_of_line_messages(self._settings.blocked_deadline_s)

    async def _report_lag(self) -> None:
        while True:
            for lane in self._lanes:
                try:
                    self.lags[lane.priority] = lag = await lane.consumer.lag()
                except Exception as error:  # noqa: BLE001 - after any error the lag is read again in a second
                    self.lags.pop(lane.priority, None)
                    log.warning("cannot read the lag of the %s stream; next try in a second: %s", lane.priority, error)
                    continue
                for partition, waiting in lag.by_partition.items():
                    telemetry.LAG.set(waiting, {"priority": lane.priority, "partition": str(partition)})
            await asyncio.sleep(_LAG_INTERVAL_S)
