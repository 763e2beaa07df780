"""Worker processes on one stream, which a test kills, and their submissions."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import kafka
from kafka.errors import KafkaError

from services.core.processes import SupervisedProcess
from services.core.settings import Settings
from services.streams.base import Message, OutgoingMessage
from services.streams.kafka.client import parse_bootstrap_servers
from tests.support.streams_bench import Streams, eventually, reach


class Fleet:
    """Workers by name."""

    def __init__(self, streams: Streams, directory: Path) -> None:
        self._streams = streams
        self._directory = directory
        self._workers: dict[str, SupervisedProcess] = {}
        self._started = 0
        self.submitted = 0

    def settings(self, **overrides: Any) -> Settings:
        settings = self._streams.settings(shadow_verdicts_stream=f"{self._streams.name}.shadows", **overrides)
        return settings.model_copy(
            update={"kafka_options": settings.kafka_options | {"transaction_timeout_ms": 2_000}, "in_flight": 40}
        )

    def start(self, name: str, *dying: object, dynamic: bool = False) -> None:
        """Start the worker `name`. Unless it is dynamic, it has the same member id at every start."""
        self._started += 1
        settings = self.settings(member_id="" if dynamic else name)
        argv = [sys.executable, "-m", "tests.streams.worker", settings.model_dump_json(), str(self._started)]
        log = self._directory / f"{self._started}-{name}.log"
        self._workers[name] = SupervisedProcess([*argv, *map(str, dying)], log=log)

    async def died(self, name: str) -> None:
        """Give all of them more work until it killed itself."""

        async def gone() -> bool:
            await self.submit(24)
            return self._workers[name].returncode is not None

        try:
            await eventually(gone, within_s=60)
        except AssertionError as error:
            raise AssertionError(f"{name} did not die\n{await self.describe()}") from error
        del self._workers[name]

    def stop(self, name: str) -> None:
        """An orderly end."""
        self._workers.pop(name).stop(grace_s=20)

    def kill(self, name: str) -> None:
        self._workers.pop(name).kill()

    async def submit(self, count: int) -> None:
        """More work, in twelve keys."""
        numbers = range(self.submitted, self.submitted + count)
        self.submitted += count
        stream = self.settings().submissions_stream
        await self._streams.publish(*(OutgoingMessage(stream, str(n).encode(), str(n % 12).encode()) for n in numbers))

    async def settled(self, share: float = 1.0) -> None:
        """Wait until that share of everything submitted has its verdict."""

        async def judged() -> int:
            assert all(worker.returncode is None for worker in self._workers.values()), self.tails()
            return len(await self._streams.everything(self.settings().verdicts_stream))

        await reach(share * self.submitted, judged, describe=self.describe)

    async def describe(self) -> str:
        """The submissions without a verdict, the group, and the ends of the logs of all workers."""
        verdicts, _ = await self.outputs()
        missing = sorted(set(range(self.submitted)) - {int(each.value) for each in verdicts})
        group = await asyncio.to_thread(self._describe_group) if self._streams.url.startswith("kafka://") else ""
        return f"without a verdict (number modulo 12 is the key): {missing}\n{group}\n{self.tails()}"

    def _describe_group(self) -> str:
        """Members, committed offsets and the end of each partition; a reader of committed records sees other ends."""
        settings = self.settings()
        servers = parse_bootstrap_servers(self._streams.url)
        lines: list[str] = []
        try:
            admin = kafka.KafkaAdminClient(bootstrap_servers=servers)
            try:
                lines.append(f"group: {admin.describe_groups([settings.group])}")
                lines.append(f"committed: {admin.list_group_offsets({settings.group: None})}")
                transactions = [each for each in admin.list_transactions() if settings.group in str(each)]
                lines.append(f"transactions: {transactions}")
            finally:
                admin.close()
            for isolation in ("read_committed", "read_uncommitted"):
                consumer = kafka.KafkaConsumer(bootstrap_servers=servers, isolation_level=isolation)
                try:
                    for topic in (settings.submissions_stream, settings.verdicts_stream):
                        partitions = [
                            kafka.TopicPartition(topic, each) for each in consumer.partitions_for_topic(topic) or ()
                        ]
                        lines.append(f"ends, {isolation}: {consumer.end_offsets(partitions)}")
                finally:
                    consumer.close()
        except (KafkaError, OSError) as error:
            lines.append(f"Kafka does not answer: {error!r}")
        return "\n".join(lines)

    def tails(self) -> str:
        return "\n".join(f"--- {name}\n{worker.tail(60)}" for name, worker in self._workers.items())

    def end(self) -> None:
        for worker in self._workers.values():
            worker.kill()

    async def outputs(self) -> tuple[list[Message], list[Message]]:
        """The verdicts and the shadow verdicts that are committed."""
        settings = self.settings()
        return (
            await self._streams.everything(settings.verdicts_stream),
            await self._streams.everything(settings.shadow_verdicts_stream),
        )

    async def check(self) -> None:
        """Every submission has its outputs, and has them once."""
        verdicts, shadows = await self.outputs()
        everyone = sorted(str(number).encode() for number in range(self.submitted))
        assert sorted(each.value for each in verdicts) == everyone
        assert sorted(each.value for each in shadows) == [each for each in everyone if each.endswith(b"7")]
