"""Nodes are lost, the head is lost, and the service is upgraded and shrunk, all under load: no submission is.

One cluster for all tests. They look at it from outside: at what is on the streams, and at which processes there are.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import redis

from services.core.messages import Submission, Verdict
from services.core.settings import Settings
from services.streams.base import OutgoingMessage, Publisher, Reader
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher, open_reader
from tests.faults.backends import Store, environment_of
from tests.faults.cluster_app import IN_FLIGHT
from tests.faults.ray_nodes import Cluster
from tests.faults.s3 import BUCKET
from tests.support.servers import Valkey

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

_PER_S: Final = 6.0
"""More than one guard judges, less than two do."""
_GUARDS, _INTAKES = 2, 2
_PATIENCE_S: Final = 180.0
"""For anything to happen, on a machine that has other things to do."""
_LOOK_S: Final = 0.25
_SOME: Final = 12
"""Verdicts that are no remainder of something."""


@dataclass(slots=True)
class Service:
    """The cluster, and what a client needs to know."""

    cluster: Cluster
    settings: Settings
    numbers: Iterator[int]

    def deploy(self, *arguments: str, **changes: Any) -> None:
        """As an operator does: from a process of its own. `changes`: of the settings. Blocks."""
        self.settings = self.settings.model_copy(update=changes)
        environment = self.cluster.environment | environment_of(self.settings)
        argv = [sys.executable, "-m", "tests.faults.cluster_app", self.cluster.address, *arguments]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr

    def unsettled(self) -> int:
        """Submissions that have no end yet."""
        with redis.Redis.from_url(self.settings.stream_url) as client:
            groups: Any = client.xinfo_groups(self.settings.submissions_stream)
        return sum(each["pending"] + each["lag"] for each in groups)

    def members(self) -> set[int]:
        """Processes that are members of the group, and live."""
        with redis.Redis.from_url(self.settings.stream_url) as client:
            consumers: Any = client.xinfo_consumers(self.settings.submissions_stream, self.settings.group)
        found = {int(each["name"].decode().removeprefix(f"{os.uname().nodename}-").split("-")[0]) for each in consumers}
        return set(filter(lives, found))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A head, two nodes for Intake, two with GPUs, and the application on them."""
    with ExitStack() as closing:
        # Ray's sockets have long names, so the folder has a short one.
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True)))
        valkey, store = Valkey(folder / "valkey"), Store(folder, seed=1)
        closing.callback(valkey.kill)
        valkey.start()
        settings = Settings(
            stream_url=valkey.url,
            redis_url=valkey.url,
            s3_endpoint=store.endpoint,
            s3_buckets=(BUCKET,),
            policy_bucket="policies",
            model="tiny",
            backfill_stream="",
            gateway_replicas=0,
            intake_replicas=_INTAKES,
            decode_workers=1,
            drain_s=10,
            redis_claim_idle_s=6,
            guard_in_flight=IN_FLIGHT,
            guard_max_replicas=_GUARDS,
            replica_rate=5,
            replica_start_s=10,
            objective_s=20,
            scale_down_s=3600,
            idle_s=3600,
            log_file=folder / "replicas.log",
        )
        closing.callback(store.kill)
        store.start(settings.policy_bucket)
        cluster = Cluster(folder, f"127.0.0.1:{valkey.port}", environment_of(settings))
        closing.callback(cluster.kill)
        cluster.head.start()
        service = Service(cluster, settings, count())
        service.deploy()
        cluster.add("cpu", "gpu", "cpu", "gpu")
        yield service


class Load:
    """Submissions at a steady rate, and their ends."""

    def __init__(self, service: Service) -> None:
        self.sent: dict[str, float] = {}
        """When, on this process' clock."""
        self.verdicts: list[tuple[float, Verdict]] = []
        """When it came, and what it was."""
        self.is_enough = False
        self._service = service

    async def until(self, what: str, holds: Callable[[], bool]) -> float:
        """Wait for something, and return when it was seen."""
        deadline = time.monotonic() + _PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"not within {_PATIENCE_S:g} s: {what}"
            await asyncio.sleep(_LOOK_S)
        return time.monotonic()

    async def until_whole(self, since: float) -> float:
        """Wait until as many guards and intakes work as are wanted, and return when they do."""
        await self.until("all intakes", lambda: len(self._service.members()) == _INTAKES)
        return await self.until("verdicts of all guards", lambda: len(self.guards(since)) == _GUARDS)

    def guards(self, since: float) -> set[int]:
        """Processes that have judged since then, and live."""
        return set(filter(lives, {pid_of(each) for came, each in self.verdicts if came > since}))

    def settled_of_those_sent_since(self, moment: float) -> int:
        """Submissions that were sent after a moment and have ended."""
        return sum(self.sent[each.submission_id] > moment for _, each in self.verdicts)

    async def send(self, publisher: Publisher) -> None:
        while not self.is_enough:
            number = next(self._service.numbers)
            name, uri = f"c-{number}", f"s3://{BUCKET}/{number % 8}/{number}.jpg"
            self.sent[name] = time.monotonic()
            value = Submission(id=name, uri=uri, submitted_at=datetime.now(UTC)).model_dump_json().encode()
            await publisher.publish([OutgoingMessage(self._service.settings.submissions_stream, value, uri.encode())])
            await asyncio.sleep(1 / _PER_S)

    async def read(self, reader: Reader) -> None:
        async for message in reader.read(self._service.settings.verdicts_stream, follow=True):
            verdict = Verdict.model_validate_json(message.value)
            if verdict.submission_id in self.sent:
                self.verdicts.append((time.monotonic(), verdict))


def lives(pid: int) -> bool:
    """Whether a process is there, more than its name, and not frozen."""
    try:
        return psutil.Process(pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}
    except psutil.NoSuchProcess:
        return False


def pid_of(verdict: Verdict) -> int:
    """The process that has judged."""
    assert verdict.model
    return int(verdict.model.engine.rpartition(" ")[2])


@asynccontextmanager
async def under_load(service: Service) -> AsyncIterator[Load]:
    """Submit while the block runs; afterwards every submission has to end, once, with a verdict.

    On Redis Streams an end is published and its submission acknowledged in one step, so that holds for any failure.
    """
    load = Load(service)
    publisher, reader = (
        await open_publisher(StreamConfig.from_settings(service.settings)),
        await open_reader(StreamConfig.from_settings(service.settings)),
    )
    sending, reading = (asyncio.create_task(each) for each in (load.send(publisher), load.read(reader)))
    try:
        yield load
        load.is_enough = True
        await sending
        await load.until("an end of every submission", lambda: service.unsettled() == 0)
        streams = (service.settings.verdicts_stream, service.settings.dead_letters_stream)
        ends, dead = [[each.value async for each in reader.read(stream, follow=False)] for stream in streams]
        verdicts = [each for each in map(Verdict.model_validate_json, ends) if each.submission_id in load.sent]
        assert dead == []
        assert Counter(each.submission_id for each in verdicts) == Counter(load.sent.keys())
        assert len({each.verdict_id for each in verdicts}) == len(load.sent)
        assert {each.outcome for each in verdicts} == {"verdict"}
    finally:
        for task in (sending, reading):
            task.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)
        await publisher.close()
        await reader.close()


async def test_cluster_lost_nodes_are_replaced(service: Service) -> None:
    cluster = service.cluster
    async with under_load(service) as load:
        await load.until_whole(0)
        guards, members = load.guards(0), service.members()
        lost = [cluster.node_of(guards.pop()), cluster.node_of(members.pop())]
        for node in lost:
            await asyncio.to_thread(node.kill)
        killed = time.monotonic()
        await load.until("verdicts of what is left", lambda: load.settled_of_those_sent_since(killed) > _SOME)
        await asyncio.to_thread(cluster.add, "cpu", "gpu")
        await load.until_whole(killed)
        assert guards < load.guards(killed)
        assert members < service.members()


@pytest.mark.long
async def test_cluster_hung_nodes_are_replaced_and_end_when_resumed(service: Service) -> None:
    cluster = service.cluster
    async with under_load(service) as load:
        await load.until_whole(0)
        guards, members = load.guards(0), service.members()
        silent = [cluster.node_of(guards.pop()), cluster.node_of(members.pop())]
        for node in silent:
            node.freeze()
        frozen = time.monotonic()
        await load.until("verdicts of what is left", lambda: load.settled_of_those_sent_since(frozen) > _SOME)
        await asyncio.to_thread(cluster.add, "cpu", "gpu")
        whole = await load.until_whole(frozen)
        # They find their work done by others, and that they do not belong to the cluster any more.
        for node in silent:
            node.thaw()
        await load.until("their end", lambda: not any(node.processes() for node in silent))
        await load.until("verdicts of the others", lambda: load.settled_of_those_sent_since(whole) > _SOME)
        assert members < service.members()


async def test_cluster_restarted_head_keeps_the_running_replicas(service: Service) -> None:
    async with under_load(service) as load:
        await load.until_whole(0)
        guards, members = load.guards(0), service.members()
        await asyncio.to_thread(service.cluster.head.kill)
        killed = time.monotonic()
        await load.until("verdicts without a head", lambda: load.settled_of_those_sent_since(killed) > 2 * _SOME)
        await asyncio.to_thread(service.cluster.head.start)
        # The head has found them again, and keeps them: it replaces the one that is killed now, and only that one.
        lost = guards.pop()
        os.kill(lost, signal.SIGKILL)
        again = time.monotonic()
        await load.until_whole(again)
        assert guards < load.guards(again)
        assert members == service.members()


async def test_cluster_redeploy_replaces_replicas_without_a_gap(service: Service) -> None:
    async with under_load(service) as load:
        await load.until_whole(0)
        guards, members = load.guards(0), service.members()
        fewest = _INTAKES

        def is_done() -> bool:
            nonlocal fewest
            now = service.members()
            fewest = min(fewest, len(now))
            return len(now - members) == len(now) == _INTAKES and len(load.guards(asked) - guards) == _GUARDS

        asked = time.monotonic()
        await asyncio.to_thread(service.deploy, guard_deadline_s=service.settings.guard_deadline_s + 1)
        done = await load.until("verdicts of new guards, received by new intakes", is_done)
        await load.until("verdicts of them alone", lambda: load.settled_of_those_sent_since(done) > _SOME)
        # There was an intake at any time, and a guard: the last old one judged when the first new one did.
        assert fewest > 0
        by_old = [came for came, each in load.verdicts if pid_of(each) in guards]
        by_new = [came for came, each in load.verdicts if pid_of(each) not in guards]
        assert min(by_new) < max(by_old) < done


async def test_cluster_with_one_guard_fewer_judges_and_grows_again(service: Service) -> None:
    async with under_load(service) as load:
        await load.until_whole(0)
        guards, members = load.guards(0), service.members()
        await asyncio.to_thread(service.deploy, "1")
        await load.until("the end of a guard", lambda: sum(map(lives, guards)) == 1)
        fewer = time.monotonic()
        await load.until("verdicts of the other", lambda: load.settled_of_those_sent_since(fewer) > _SOME)
        assert load.guards(fewer) < guards
        await asyncio.to_thread(service.deploy)
        await load.until_whole(fewer)
        assert members == service.members()
