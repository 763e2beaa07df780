"""The processes that are killed: intake members and guard replicas, each in a place where it is started again."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from services.core.processes import SupervisedProcess, find_free_port
from tests.faults.member import NOT_NOW
from tests.support.kafka_broker import ROOT

_LOOK_S: Final = 0.2
_AGAIN_S: Final = 1.0
_END_S: Final = 15.0
"""What a member gets beyond `drain_s` to be gone."""

_BEFORE_IT_LISTENS: Final = -signal.SIGTERM & 0xFF
"""The status of a member that got SIGTERM while Python was still importing."""

UNFORESEEN_FAILURES: Final = (
    "a defect of Sluice stopped message",
    "committing a transaction failed",
    "refreshing policies failed",
    "checking the circuit breaker",
    "writing the traffic sample failed",
)
"""How Sluice logs an exception that it has not foreseen."""


class Place:
    """Where one process runs, and is started again when it ends by itself or is killed."""

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.wanted = False
        self.problems: list[str] = []
        """What it did that no fault explains."""
        self.busy = asyncio.Lock()
        """Held while it is being killed, or stopped."""
        self._argv = argv
        self._environment = environment
        self._child: SupervisedProcess | None = None

    @property
    def pid(self) -> int | None:
        """Of the process whose descendants it is; None while it does not run."""
        return None if self._child is None else self._child.pid

    async def kill(self, for_s: float) -> None:
        """SIGKILL; after `for_s` it runs again."""
        async with self.busy:
            if self._child is not None:
                await asyncio.to_thread(self._child.kill)
                self._child = None
            await asyncio.sleep(for_s)

    async def freeze(self, for_s: float) -> None:
        """SIGSTOP, and SIGCONT after `for_s`: it goes on as if no time had passed, whoever has its work by then."""
        async with self.busy:
            frozen = [] if self._child is None else _processes(self._child, self._argv)
            for process in frozen:
                process.suspend()
            await asyncio.sleep(for_s)
            for process in frozen:
                process.resume()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and see that it ends well within `grace_s`."""
        self.wanted = False
        async with self.busy:
            if self._child is None:
                return
            await asyncio.to_thread(self._child.stop, grace_s)
            if self._child.returncode not in (0, NOT_NOW, _BEFORE_IT_LISTENS):
                self.problems.append(
                    f"{self.name} ended with status {self._child.returncode} after SIGTERM and {grace_s:g} s"
                )
            self._child = None

    async def keep(self) -> None:
        """Start it whenever it is wanted and does not run; for ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self.wanted or self.busy.locked():
                continue
            if self._child is not None and self._child.returncode is not None:
                if self._child.returncode != NOT_NOW:
                    last = self._child.tail(3)
                    self.problems.append(f"{self.name} ended by itself, status {self._child.returncode}: {last}")
                self._child = None
                await asyncio.sleep(_AGAIN_S)
            if self._child is None:
                self._child = SupervisedProcess(self._argv, log=self.log, env=self._environment)


class Fleet:
    """Members and replicas. Use it as `async with`."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        links: Sequence[str],
        *,
        guards: int,
        refused: str,
        drain_s: float,
    ) -> None:
        """`links`: for each member the URL of its stream."""
        environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
        ports = [str(find_free_port()) for _ in range(guards)]
        module = (sys.executable, "-m")
        self.guards = [
            Place(f"guard-{n}", (*module, "tests.faults.guard", port, refused), environment, folder / f"guard-{n}.log")
            for n, port in enumerate(ports)
        ]
        self.members = [
            Place(
                f"member-{n}",
                (*module, "tests.faults.member", f"member-{n}", *ports),
                environment | {"SLUICE_STREAM_URL": url},
                folder / f"member-{n}.log",
            )
            for n, url in enumerate(links)
        ]
        self._grace_s = drain_s + _END_S
        self._keeping: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Fleet":
        self._keeping = [asyncio.create_task(place.keep()) for place in (*self.members, *self.guards)]
        for guard in self.guards:
            guard.wanted = True
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*(place.kill(0) for place in (*self.members, *self.guards)))

    @property
    def problems(self) -> list[str]:
        """What members and replicas did that no fault explains; with faults of Sluice itself from the logs."""
        logged = [f"{member.name} logged: {line}" for member in self.members for line in _own_faults(member.log)]
        return [problem for place in (*self.members, *self.guards) for problem in place.problems] + logged

    async def set_members(self, count: int) -> None:
        """Start members until there are `count`, or have others leave."""
        running = [member for member in self.members if member.wanted]
        idle = [member for member in self.members if not member.wanted]
        for member in idle[: max(0, count - len(running))]:
            member.wanted = True
        await asyncio.gather(*(member.stop(self._grace_s) for member in running[count:]))

    async def add(self) -> None:
        """One member more, if there is a place for it."""
        await self.set_members(sum(member.wanted for member in self.members) + 1)

    async def remove(self, choice: float) -> None:
        """Have a member leave by SIGTERM."""
        await self._chosen([member for member in self.members if member.wanted], choice).stop(self._grace_s)

    async def kill_member(self, choice: float, for_s: float) -> None:
        """SIGKILL a member that is wanted."""
        await self._chosen([member for member in self.members if member.wanted], choice).kill(for_s)

    async def freeze_member(self, choice: float, for_s: float) -> None:
        """Let a member that is wanted stand still."""
        await self._chosen([member for member in self.members if member.wanted], choice).freeze(for_s)

    async def kill_guard(self, choice: float, for_s: float) -> None:
        """SIGKILL a replica."""
        await self._chosen(self.guards, choice).kill(for_s)

    @staticmethod
    def _chosen(places: Sequence[Place], choice: float) -> Place:
        return places[int(choice * len(places))]


def _processes(child: SupervisedProcess, argv: Sequence[str]) -> list[psutil.Process]:
    """The process with that command line, without its guardian."""
    try:
        return [each for each in psutil.Process(child.pid).children() if each.cmdline() == list(argv)]
    except psutil.NoSuchProcess:
        return []


def _own_faults(log: Path) -> list[str]:
    """The lines of a member's log that tell of a fault of Sluice itself, which no fault around it excuses."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [
        f"{line} {then}"
        for line, then in itertools.pairwise([*lines, ""])
        if any(words in line for words in UNFORESEEN_FAILURES)
        or ("never retrieved" in line and any(f"/{package}/" in then for package in ("services", "pipelines")))
    ]
