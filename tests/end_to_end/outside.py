"""An outside client: it starts `sluice` as a user would, and knows only the wire format, not the code."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import boto3
import kafka
import psutil
import redis

START_S = 600.0
STOP_S = 45.0
"""For the end beyond the drain. `sluice up` kills what is left after 15 s; the rest is for a busy machine."""
SLUICE = str(Path(sys.executable).with_name("sluice"))


@dataclass(frozen=True)
class Entry:
    """One message of an output stream."""

    key: bytes | None
    value: bytes
    headers: dict[str, bytes] = field(default_factory=dict)


class Stream(Protocol):
    """The streams `<prefix>.submissions`, `<prefix>.verdicts` and `<prefix>.dead-letters`."""

    def publish(self, value: bytes, key: bytes | None, headers: dict[str, bytes]) -> None: ...
    def read(self, stream: str) -> list[Entry]: ...


class Service:
    """A `sluice up` in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLUICE_", "AWS_"))}
        self.folder = folder
        self.log = folder / "up.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [SLUICE, "up", *arguments],
                cwd=folder,
                env=inherited | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> dict[str, str]:
        """Wait for .sluice/env, and return the settings in it."""
        file = self.folder / ".sluice" / "env"
        deadline = time.monotonic() + START_S
        while not file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"`sluice up` did not get ready:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.2)
        assert file.stat().st_mode & 0o777 == 0o600
        return dict(line.split("=", 1) for line in file.read_text().splitlines())

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def listening(self) -> set[str]:
        """The addresses on which the processes of the service accept connections."""
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [psutil.Process(self.process.pid), *self.descendants()]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def terminate(self, within_s: float) -> None:
        """Send SIGTERM. The process and its descendants have to end in time."""
        self._end(lambda: self.process.send_signal(signal.SIGTERM), within_s)
        assert not (self.folder / ".sluice" / "env").exists()

    def interrupt(self, within_s: float) -> None:
        """Send SIGINT to the process group, as a terminal does. The process and its descendants have to end in time."""
        self._end(lambda: os.killpg(self.process.pid, signal.SIGINT), within_s)
        assert not (self.folder / ".sluice" / "env").exists()

    def kill_alone(self, within_s: float) -> None:
        """Send SIGKILL to the process that the user started. Its descendants have to end by themselves."""
        self._end(self.process.kill, within_s)

    def _end(self, signal_it: Callable[[], None], within_s: float) -> None:
        family = self.descendants()
        started = time.monotonic()
        signal_it()
        self.process.wait(within_s)
        _, left = psutil.wait_procs(family, timeout=max(0.0, within_s - (time.monotonic() - started)))
        assert not left, f"left behind: {left}"

    def kill(self) -> None:
        """Kill the processes that are left, also after a failure."""
        family = self.descendants() if self.process.poll() is None else []
        for process in [*family, self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class RedisStream:
    """The streams of a Redis server, read and written by redis-py."""

    def __init__(self, url: str, prefix: str = "sluice") -> None:
        self._prefix = prefix
        self._redis = redis.Redis.from_url(url)

    def publish(self, value: bytes, key: bytes | None, headers: dict[str, bytes]) -> None:
        fields: dict[Any, Any] = {"value": value} | {f"header:{name}": content for name, content in headers.items()}
        self._redis.xadd(f"{self._prefix}.submissions", fields if key is None else fields | {"key": key})

    def lengths(self) -> tuple[int, int]:
        """The number of verdicts and of dead letters."""
        verdicts, letters = (self._redis.xlen(f"{self._prefix}.{name}") for name in ("verdicts", "dead-letters"))
        return int(verdicts), int(letters)  # type: ignore[arg-type]

    def read(self, stream: str) -> list[Entry]:
        return [
            Entry(
                fields.get(b"key"),
                fields[b"value"],
                {
                    name.decode().removeprefix("header:"): content
                    for name, content in fields.items()
                    if name.startswith(b"header:")
                },
            )
            for _, fields in self._redis.xrange(f"{self._prefix}.{stream}")
        ]


class KafkaStream:
    """The topics of a Kafka broker, read and written by kafka-python."""

    def __init__(self, address: str, prefix: str) -> None:
        self._prefix = prefix
        self._address = address
        self._producer = kafka.KafkaProducer(bootstrap_servers=address, max_request_size=4 << 20)

    def publish(self, value: bytes, key: bytes | None, headers: dict[str, bytes]) -> None:
        self._producer.send(f"{self._prefix}.submissions", value, key, headers=list(headers.items())).get(30)

    def read(self, stream: str) -> list[Entry]:
        topic = f"{self._prefix}.{stream}"
        consumer = kafka.KafkaConsumer(bootstrap_servers=self._address, group_id=None, enable_auto_commit=False)
        try:
            numbers = consumer.partitions_for_topic(topic) or set()
            partitions = [kafka.TopicPartition(topic, number) for number in sorted(numbers)]
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            ends = consumer.end_offsets(partitions)
            entries = []
            while any(consumer.position(partition) < ends[partition] for partition in partitions):
                for records in consumer.poll(500).values():
                    entries += [Entry(record.key, record.value, dict(record.headers)) for record in records]
            return entries
        finally:
            consumer.close()


class Uploads:
    """boto3, on the bucket `uploads`."""

    def __init__(self, endpoint: str, credentials: dict[str, str]) -> None:
        self._s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=credentials["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=credentials["AWS_SECRET_ACCESS_KEY"],
            region_name=credentials["AWS_DEFAULT_REGION"],
        )

    def create(self, *buckets: str) -> None:
        for bucket in buckets:
            self._s3.create_bucket(Bucket=bucket)

    def put(self, key: str, data: bytes) -> str:
        """Upload an object with a wrong content type, and return its ETag without quotes."""
        answer = self._s3.put_object(Bucket="uploads", Key=key, Body=data, ContentType="application/x-lie")
        return str(answer["ETag"]).strip('"')


def wait_until_settled(
    stream: Stream, count: int, within_s: float, before: tuple[int, int] = (0, 0)
) -> tuple[list[Entry], list[Entry]]:
    """Wait until `count` submissions have a verdict or a dead letter, and return all verdicts and dead letters.

    A submission with two of the same counts once, because delivery at least once may repeat them. `before` are the
    lengths of the two streams before the test, whose entries are left out.
    """
    deadline = time.monotonic() + within_s

    def read() -> tuple[list[Entry], list[Entry]]:
        return stream.read("verdicts")[before[0] :], stream.read("dead-letters")[before[1] :]

    def settled() -> int:
        verdicts, letters = read()
        judged = {json.loads(entry.value)["submission_id"] for entry in verdicts}
        return len(judged) + len({entry.value for entry in letters})

    while time.monotonic() < deadline and settled() < count:
        time.sleep(0.5)
    time.sleep(2)  # a duplicate may still come
    return read()


def new_folder(parent: Path) -> Path:
    folder = parent / uuid.uuid4().hex[:8]
    folder.mkdir()
    return folder


def submit(stream: Stream, cases: Iterable[Any]) -> None:
    for case in cases:
        stream.publish(case.value, case.key, case.headers)
