"""Half of the rate that the machine sustains, for a long time: what grows, that should not?

    python -m tests.faults.soak [--minutes 30] [--seed 1] [--delivery at_least_once|exactly_once]

On a real Kafka, a real Valkey, the light S3 server and the scripted guards of this suite, with one intake member. The
first minute finds out the rate, with a backlog that never ends. Samples go to stderr, one JSON line to stdout; the exit
status is 1 if memory, file handles or lag grew, or if a submission did not have the expected outcome.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import psutil
from scipy import stats

from tests.faults.backends import DRAIN_S, Backends, Delivery
from tests.faults.check import check
from tests.faults.fleet import Fleet
from tests.faults.streams import Backlog, Producer, read_all
from tests.faults.submissions import Submitted, endless
from tests.support import kafka_broker

MIB: Final = 1 << 20
_BACKLOG: Final = 4_000
_WARM_S: Final = 15.0
_MEASURED_S: Final = 45.0
_SAMPLE_S: Final = 5.0
_TICK_S: Final = 0.5
_DRAINED_S: Final = 120.0
_UNSETTLED: Final = 0.2
"""The share of the time that is left out: caches fill up and pools grow to their size."""
_GROWTH: Final = 0.05
"""Of memory, in one run of the usual length, that noise explains."""
_USUAL_S: Final = 1_800.0
_HANDLES: Final = 3
_LAG_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the member and its children hold at one moment."""

    at_s: float
    memory_bytes: int
    """That no other process shares."""
    handles: int
    lag: int


@dataclass(frozen=True, slots=True)
class Account:
    """What came of it."""

    minutes: float
    submissions: int
    sustained_per_s: float
    rate_per_s: float
    memory_mib: float
    memory_slope_mib_per_hour: float
    handles_first: int
    handles_last: int
    lag_first: float
    lag_last: float
    lag_max: int
    problems: int


class Soak:
    """One run."""

    def __init__(self, backends: Backends, fleet: Fleet, seed: int, say: Callable[[str], None]) -> None:
        self._backends = backends
        self._fleet = fleet
        self._say = say
        self._next: Iterator[Submitted] = endless(seed, backends.pictures)
        self._submitted: list[Submitted] = []
        self._producer = Producer(backends.broker.address, backends.settings.submissions_stream)
        settings = backends.settings
        self._backlog = Backlog(backends.broker.address, settings.submissions_stream, settings.group)

    async def run(self, minutes: float) -> tuple[Account, list[str]]:
        """The account, and what is off, in sentences."""
        await self._fleet.set_members(1)
        sustained = await self._sustained()
        rate = sustained / 2
        self._say(f"the machine sustains {sustained:.0f} messages a second; {rate:.0f} a second from here on")
        await self._drained()
        samples = await self._steady(rate, minutes * 60)
        await self._drained()
        await self._fleet.set_members(0)
        self._producer.close()
        self._backlog.close()
        return await asyncio.to_thread(self._account, sustained, rate, minutes, samples)

    async def _sustained(self) -> float:
        """Messages a second, while more wait than can be worked on."""
        deadline = time.monotonic() + _WARM_S + _MEASURED_S
        began, first = 0.0, 0
        while (now := time.monotonic()) < deadline:
            waiting = await self._waiting()
            if waiting < _BACKLOG / 2:
                await self._publish(_BACKLOG)
            if not began and now > deadline - _MEASURED_S:
                began, first = time.monotonic(), len(self._submitted) - await self._waiting()
            await asyncio.sleep(_TICK_S)
        return (len(self._submitted) - await self._waiting() - first) / (time.monotonic() - began)

    async def _steady(self, rate: float, seconds: float) -> list[Sample]:
        began = time.monotonic()
        published, samples = 0, list[Sample]()
        while (passed := time.monotonic() - began) < seconds:
            due = int(passed * rate) - published
            await self._publish(due)
            published += due
            if passed >= len(samples) * _SAMPLE_S:
                samples.append(await self._sample(passed))
            await asyncio.sleep(_TICK_S)
        return samples

    async def _sample(self, at_s: float) -> Sample:
        memory, handles = await asyncio.to_thread(_held, self._fleet.members[0].pid)
        sample = Sample(at_s, memory, handles, await self._waiting())
        if int(at_s / _SAMPLE_S) % 12 == 0:
            self._say(f"[{at_s:6.0f} s] {memory / MIB:.1f} MiB, {handles} file handles, {sample.lag} messages wait")
        return sample

    async def _publish(self, count: int) -> None:
        messages = list(islice(self._next, count))
        self._submitted += messages
        await asyncio.to_thread(self._producer.publish, messages)

    async def _waiting(self) -> int:
        backlog = await asyncio.to_thread(self._backlog.read)
        return len(self._submitted) if backlog is None else backlog

    async def _drained(self) -> None:
        """Wait until no message waits, or no less than before for `_DRAINED_S`."""
        least, shrunk = len(self._submitted) + 1, time.monotonic()
        while waiting := await self._waiting():
            if waiting < least:
                least, shrunk = waiting, time.monotonic()
            elif time.monotonic() - shrunk > _DRAINED_S:
                return  # what is left is found to be lost
            await asyncio.sleep(_TICK_S)

    def _account(
        self, sustained: float, rate: float, minutes: float, samples: Sequence[Sample]
    ) -> tuple[Account, list[str]]:
        settings, address = self._backends.settings, self._backends.broker.address
        streams = (settings.submissions_stream, settings.verdicts_stream, settings.dead_letters_stream)
        findings = check(
            self._submitted,
            *(read_all(address, stream) for stream in streams),
            exactly_once=settings.delivery == "exactly_once",
        )
        problems = [*findings.sentences(), *self._fleet.problems]
        settled = samples[int(len(samples) * _UNSETTLED) :]
        third = max(1, len(settled) // 3)
        slope = stats.theilslopes([each.memory_bytes for each in settled], [each.at_s for each in settled]).slope
        memory = statistics.mean(each.memory_bytes for each in settled)
        handles = [
            round(statistics.median(each.handles for each in part)) for part in (settled[:third], settled[-third:])
        ]
        lags = [statistics.mean(each.lag for each in part) for part in (settled[:third], settled[-third:])]
        if slope * _USUAL_S > _GROWTH * memory:
            problems.append(f"memory grows by {slope * 3600 / MIB:.1f} MiB an hour")
        if handles[1] > handles[0] + _HANDLES:
            problems.append(f"file handles grew from {handles[0]} to {handles[1]}")
        if lags[1] > lags[0] + rate * _LAG_S:
            problems.append(f"the lag grew from {lags[0]:.0f} to {lags[1]:.0f} messages")
        account = Account(
            minutes=minutes,
            submissions=findings.submissions,
            sustained_per_s=round(sustained, 1),
            rate_per_s=round(rate, 1),
            memory_mib=round(memory / MIB, 1),
            memory_slope_mib_per_hour=round(slope * 3600 / MIB, 2),
            handles_first=handles[0],
            handles_last=handles[1],
            lag_first=round(lags[0], 1),
            lag_last=round(lags[1], 1),
            lag_max=max(each.lag for each in settled),
            problems=len(problems),
        )
        return account, problems


def _held(pid: int | None) -> tuple[int, int]:
    """Memory in bytes and file handles of a process and all that it started."""
    if pid is None:
        raise RuntimeError("the member does not run")
    family = psutil.Process(pid).children(recursive=True)
    return sum(each.memory_full_info().uss for each in family), sum(each.num_fds() for each in family)


async def soak(minutes: float, seed: int, delivery: Delivery, folder: Path) -> tuple[Account, list[str]]:
    """Run it; everything that is started is gone afterwards."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    async with AsyncExitStack() as closing:
        backends = await Backends.start(folder, seed, delivery, closing)
        fleet = Fleet(
            folder,
            backends.environment,
            [backends.settings.stream_url],
            guards=1,
            refused=backends.pictures.refused,
            drain_s=DRAIN_S,
        )
        await closing.enter_async_context(fleet)
        account, problems = await Soak(backends, fleet, seed, say).run(minutes)
        for problem in problems:
            say(problem)
        return account, problems


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--delivery", choices=("at_least_once", "exactly_once"), default="at_least_once")
    given = parser.parse_args()
    if reason := kafka_broker.missing():
        parser.error(reason)
    with tempfile.TemporaryDirectory(prefix="sluice-soak-") as folder:
        account, problems = asyncio.run(soak(given.minutes, given.seed, given.delivery, Path(folder)))
    print(json.dumps(asdict(account)))  # noqa: T201
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
