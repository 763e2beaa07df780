"""Thousands of submissions while a seeded scheduler breaks everything in turn; then each must have ended once.

    python -m tests.faults.run --seed N --submissions 20000 [--delivery at_least_once|exactly_once] [--short]

On a real Kafka, a real Valkey, the light S3 server and the scripted guards of this suite. The faults as they happen
and the tables go to stderr, one JSON line to stdout; the exit status is 1 when anything is off. See `check` for what is
held.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from tests.faults.backends import DRAIN_S, Backends, Delivery
from tests.faults.check import Findings, check
from tests.faults.fleet import Fleet
from tests.faults.proxy import Link
from tests.faults.schedule import KINDS, Fault, Kind, schedule
from tests.faults.streams import Backlog, Producer, read_all
from tests.faults.submissions import Submitted, submissions
from tests.support import kafka_broker
from tests.support.kafka_broker import ROOT, Broker
from tests.support.servers import Valkey

DELIVERIES: Final[tuple[Delivery, ...]] = get_args(Delivery)

_MEMBERS: Final = 2
_GUARDS: Final = 2
_SUBMISSIONS_PER_ROUND: Final = 2_500
SHORT: Final = 2_000
_BEHIND: Final = 1_000
"""With more messages than that to be settled, the next fault waits: a system that only lies still proves nothing."""
_PATIENCE_S: Final = 30.0
_SETTLED_S: Final = 180.0
"""How long nothing may move, once everything is mended, before the rest counts as lost."""
_LOOK_S: Final = 0.5
_GIVE_UP_S: Final = 100
"""Of `sluice reconcile`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run does."""

    seed: int
    submissions: int
    delivery: Delivery

    @property
    def faults(self) -> list[Fault]:
        """Each kind once at least."""
        return list(schedule(self.seed, max(1, self.submissions // _SUBMISSIONS_PER_ROUND)))


@dataclass(slots=True)
class Report:
    """What came of a run."""

    plan: Plan
    findings: Findings
    reconciled: Mapping[str, Any]
    """The account of `sluice reconcile`."""
    faults: Counter[Kind] = field(default_factory=Counter)
    seconds: float = 0.0
    """From the first submission until everything was settled."""

    def table(self) -> str:
        """For people."""
        found, plan = self.findings, self.plan
        rows: list[tuple[str, object]] = [
            ("seed", plan.seed),
            ("delivery", plan.delivery),
            ("submissions", f"{found.submissions:,}"),
            *((f"verdicts: {outcome}", f"{count:,}") for outcome, count in sorted(found.verdicts.items())),
            *((f"dead letters: {reason}", f"{count:,}") for reason, count in sorted(found.dead_letters.items())),
            ("lost", found.lost),
            ("duplicates", found.duplicates),
            *((f"fault: {kind}", self.faults[kind]) for kind in KINDS),
            ("duration", f"{self.seconds:.0f} s"),
            ("rate", f"{found.submissions / self.seconds:.0f} a second"),
            ("reconcile", ", ".join(f"{name} {self.reconciled.get(name, '-')}" for name in _COUNTED)),
            ("problems", len(found.problems)),
        ]
        return "\n".join(f"{name:<32}{value}" for name, value in rows)


_COUNTED: Final = ("submissions", "lost", "repeats", "conflicting", "unexplained")
_Say = Callable[[str], None]


async def storm(plan: Plan, folder: Path, say: _Say = lambda _: None) -> Report:
    """Run a plan; everything that is started is gone afterwards. `folder` takes data and logs."""
    async with AsyncExitStack() as closing:
        backends = await Backends.start(folder, plan.seed, plan.delivery, closing)
        fleet = await closing.enter_async_context(
            Fleet(
                folder,
                backends.environment,
                [f"kafka://127.0.0.1:{link.port}" for link in backends.links],
                guards=_GUARDS,
                refused=backends.pictures.refused,
                drain_s=DRAIN_S,
            )
        )
        await fleet.set_members(_MEMBERS)
        run = _Storm(plan, backends, fleet, say)
        await run.blow()
        await fleet.set_members(0)
        findings, reconciled = await run.look()
        findings.problems += fleet.problems
        return Report(plan, findings, reconciled, run.struck, run.seconds)


class _Storm:
    """The submissions and the faults of one run."""

    def __init__(self, plan: Plan, backends: Backends, fleet: Fleet, say: _Say) -> None:
        self.struck: Counter[Kind] = Counter()
        self.seconds = 0.0
        self._plan = plan
        self._backends = backends
        self._fleet = fleet
        self._say = say
        self._submitted = submissions(plan.seed, plan.submissions, backends.pictures)
        settings = backends.settings
        self._backlog = Backlog(backends.broker.address, settings.submissions_stream, settings.group)
        self._began = 0.0
        self._one_at_a_time = {name: asyncio.Lock() for name in ("broker", "cache", "S3")}
        self._links_in_use = [asyncio.Lock() for _ in backends.links]

    async def blow(self) -> None:
        """Publish everything while the faults strike, mend everything, and wait until all is settled."""
        faults = self._plan.faults
        stream, address = self._backends.settings.submissions_stream, self._backends.broker.address
        await self._await_backlog(lambda backlog: backlog is not None, 60)
        producer = await asyncio.to_thread(Producer, address, stream)
        self._began = time.monotonic()
        publishing: list[Future[None]] = []
        publisher = ThreadPoolExecutor(1)  # one, to keep the order
        striking: list[asyncio.Task[None]] = []
        for fault, share in zip(faults, _shares(self._submitted, len(faults)), strict=True):
            publishing.append(publisher.submit(producer.publish, share))
            await asyncio.sleep(fault.after_s)
            striking.append(asyncio.create_task(self._strike(fault), name=fault.kind))
            await self._await_backlog(lambda backlog: backlog is not None and backlog < _BEHIND, _PATIENCE_S)
        await asyncio.gather(*striking)
        self._log("everything is mended")
        await asyncio.gather(*map(asyncio.wrap_future, publishing))
        await asyncio.to_thread(producer.close)
        await self._fleet.set_members(_MEMBERS)
        self._log("everything is published")
        await self._settled()
        self.seconds = time.monotonic() - self._began
        self._log("nothing waits any more")

    async def look(self) -> tuple[Findings, Mapping[str, Any]]:
        """What is on the streams now, and what `sluice reconcile` says about it."""
        settings, address = self._backends.settings, self._backends.broker.address
        streams = (settings.submissions_stream, settings.verdicts_stream, settings.dead_letters_stream)
        on_stream, verdicts, letters = [await asyncio.to_thread(read_all, address, stream) for stream in streams]
        exactly_once = settings.delivery == "exactly_once"
        findings = check(self._submitted, on_stream, verdicts, letters, exactly_once=exactly_once)
        account, problems = await asyncio.to_thread(self._reconcile)
        findings.problems += problems
        findings.problems += [f"{kind} never happened" for kind in KINDS if not self.struck[kind]]
        return findings, account

    async def _settled(self) -> None:
        least, moved = sys.maxsize, time.monotonic()
        while True:
            backlog = await asyncio.to_thread(self._backlog.read)
            if backlog == 0:
                break
            if backlog is not None and backlog < least:
                least, moved = backlog, time.monotonic()
            if time.monotonic() - moved > _SETTLED_S:
                self._log(f"{backlog} messages wait, and nothing moves")
                break
            await asyncio.sleep(_LOOK_S)
        await asyncio.to_thread(self._backlog.close)

    async def _await_backlog(self, is_good: Callable[[int | None], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if is_good(await asyncio.to_thread(self._backlog.read)):
                return
            await asyncio.sleep(_LOOK_S)

    # ---- the faults

    async def _strike(self, fault: Fault) -> None:
        lasts = "" if fault.kind in {"member added", "member removed"} else f" for {fault.lasts_s:.1f} s"
        self._log(f"{fault.kind}{lasts}")
        self.struck[fault.kind] += 1
        match fault.kind.split(" "):
            case ["member", "killed"]:
                await self._fleet.kill_member(fault.choice, fault.lasts_s)
            case ["member", "frozen"]:
                await self._fleet.freeze_member(fault.choice, fault.lasts_s)
            case ["member", "added"]:
                await self._fleet.add()
            case ["member", _]:
                await self._fleet.remove(fault.choice)
            case ["guard", _]:
                await self._fleet.kill_guard(fault.choice, fault.lasts_s)
            case ["broker", _]:
                await self._restart("broker", self._backends.broker, fault.lasts_s)
            case ["cache", _]:
                await self._restart("cache", self._backends.valkey, fault.lasts_s)
            case ["S3", mode]:
                async with self._one_at_a_time["S3"]:
                    await asyncio.to_thread(self._backends.store.set_mode, mode)
                    await asyncio.sleep(fault.lasts_s)
                    await asyncio.to_thread(self._backends.store.set_mode, "pass")
            case [_, how]:
                await self._disturb(fault, how)

    async def _restart(self, name: str, server: Broker | Valkey, for_s: float) -> None:
        async with self._one_at_a_time[name]:
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(for_s)
            await asyncio.to_thread(server.start)

    async def _disturb(self, fault: Fault, how: str) -> None:
        """The network of one member, or, as often, of all of them."""
        links = list(zip(self._backends.links, self._links_in_use, strict=True))
        if fault.choice < 0.5:
            links = [random.Random(fault.choice).choice(links)]

        async def disturb(link: Link, in_use: asyncio.Lock) -> None:
            async with in_use:
                if how == "cut":
                    link.cut()
                else:
                    link.hang()
                await asyncio.sleep(fault.lasts_s)
                await link.heal()

        await asyncio.gather(*(disturb(*each) for each in links))

    # ---- reconcile

    def _reconcile(self) -> tuple[Mapping[str, Any], list[str]]:
        """Its account, and what it finds that is off; what it may say about overtaken events is left out."""
        with tempfile.TemporaryDirectory() as elsewhere:
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from pipelines.cli.main import main; main()",
                    "reconcile",
                    "--json",
                    "--settle-s",
                    "0",
                ],
                cwd=elsewhere,
                env=os.environ | self._backends.environment | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                timeout=_GIVE_UP_S,
                check=False,
            )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        account = next((line for line in lines if line["finding"] == "account"), None)
        if account is None:
            return {}, [f"sluice reconcile failed: {done.stderr.decode(errors='replace').strip()[-500:]}"]
        overtaken = {
            outcome.submission_id for each in self._submitted for outcome in each.expected if outcome.may_be_superseded
        }
        allowed = {"repeats"} if self._plan.delivery == "at_least_once" else set()
        problems = [
            f"sluice reconcile says: {line['finding']} {line['submission_id'] or line['source']} {line['ends']}"
            for line in lines
            if line["finding"] not in {"account", *allowed}
            and not (line["finding"] == "conflicting" and allowed and line["submission_id"] in overtaken)
        ]
        if account["submissions"] != self._plan.submissions:
            problems.append(f"sluice reconcile counts {account['submissions']} submissions")
        return account, problems

    def _log(self, line: str) -> None:
        self._say(f"[{time.monotonic() - self._began:6.1f} s] {line}")


def _shares(submitted: list[Submitted], count: int) -> Iterable[list[Submitted]]:
    """So many parts of about the same length, in order."""
    ends = [round(n * len(submitted) / count) for n in range(count + 1)]
    return [submitted[begin:end] for begin, end in itertools.pairwise(ends)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--submissions", type=int, default=20_000, help="for each kind of delivery")
    parser.add_argument("--delivery", choices=DELIVERIES, action="append", help="both, unless given")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} submissions, each kind of fault once")
    given = parser.parse_args()
    if reason := kafka_broker.missing():
        parser.error(reason)
    reports = [
        _report(Plan(given.seed, SHORT if given.short else given.submissions, delivery))
        for delivery in given.delivery or DELIVERIES
    ]
    print(json.dumps(summary(reports)))  # noqa: T201
    return int(any(report.findings.problems for report in reports))


def _report(plan: Plan) -> Report:
    """Run a plan and say what came of it; data and logs are kept where something is off."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    folder = Path(tempfile.mkdtemp(prefix="sluice-faults-"))
    report = asyncio.run(storm(plan, folder, say))
    for line in (report.table(), *report.findings.sentences()):
        say(line)
    if report.findings.problems:
        say(f"data and logs are in {folder}")
    else:
        shutil.rmtree(folder)
    return report


def summary(reports: Iterable[Report]) -> dict[str, int]:
    """For scripts: what was counted over all runs."""
    counted = Counter[str](
        dict.fromkeys(("duplicated_exactly_once", "unequal_duplicates_at_least_once"), 0)  # also where they did not run
    )
    for report in reports:
        found = report.findings
        exactly_once = report.plan.delivery == "exactly_once"
        counted["submissions"] += found.submissions
        counted["lost"] += found.lost
        counted["duplicated_exactly_once"] += found.duplicates if exactly_once else 0
        counted["unequal_duplicates_at_least_once"] += 0 if exactly_once else found.unequal
        counted["wrong_dead_letters"] += found.wrong_dead_letters
        counted["faults"] += report.faults.total()
        counted["problems"] += len(found.problems)
    return dict(counted)


if __name__ == "__main__":
    sys.exit(main())
