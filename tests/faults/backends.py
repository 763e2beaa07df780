"""What a storm needs around the members: Kafka with a proxy for each of them, Valkey and S3."""

import asyncio
import json
import os
import sys
import time
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, Literal

import boto3

from services.core.processes import SupervisedProcess, find_free_port
from services.core.settings import Settings
from services.policies.registry import PolicyRegistry
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.faults import s3
from tests.faults.proxy import Link
from tests.faults.submissions import Pictures
from tests.support.kafka_broker import ROOT, Broker
from tests.support.s3_server import CREDENTIALS
from tests.support.servers import Valkey

Delivery = Literal["at_least_once", "exactly_once"]

PLACES: Final = 3
"""For members: each round of faults adds one and removes one, in either order."""
DRAIN_S: Final = 5.0


class Store:
    """The S3 server, with pictures under any key."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.pictures = Pictures(folder / "pictures", seed)
        self._port = find_free_port()
        self._log = folder / "s3.log"
        self._child: SupervisedProcess | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, policy_bucket: str) -> None:
        """Start it and publish the built-in policy. Blocks until that is done."""
        argv = [sys.executable, "-m", "tests.faults.s3", str(self._port), str(self.pictures.folder)]
        self._child = SupervisedProcess(argv, log=self._log, env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 30
        while True:
            try:
                self.set_mode("pass")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start:\n{self._child.tail()}") from None
                time.sleep(0.1)
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        )
        PolicyRegistry(client, policy_bucket).publish_built_in()

    def set_mode(self, mode: str) -> None:
        """What goes wrong with it from now on."""
        request = urllib.request.Request(f"{self.endpoint}/?fault={mode}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def kill(self) -> None:
        """End it, and forget what was put."""
        if self._child is not None:
            self._child.kill()


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as a process is given them, with credentials for S3."""
    values = settings.model_dump(mode="json", exclude_defaults=True)
    spelled = {
        name: ",".join(value) if isinstance(value, list) else json.dumps(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return {f"SLUICE_{name.upper()}": str(value) for name, value in spelled.items()} | CREDENTIALS


class Backends:
    """The servers, and the settings of a member that uses them."""

    def __init__(self, folder: Path, seed: int, delivery: Delivery, links: list[Link]) -> None:
        self.links = links
        self.broker = Broker(folder / "kafka", [link.port for link in links])
        self.valkey = Valkey(folder / "valkey")
        self.store = Store(folder, seed)
        self.settings = Settings(
            stream_url=f"kafka://{self.broker.address}",
            redis_url=self.valkey.url,
            s3_endpoint=self.store.endpoint,
            s3_buckets=(s3.BUCKET,),
            policy_bucket="policies",
            model="tiny",
            delivery=delivery,
            backfill_stream="",
            drain_s=DRAIN_S,
            decode_workers=1,
            fetch_deadline_s=3,
            kafka_options={"session_timeout_ms": 3_000, "heartbeat_interval_ms": 600},
        )

    @classmethod
    async def start(cls, folder: Path, seed: int, delivery: Delivery, closing: AsyncExitStack) -> "Backends":
        """Start them, publish the built-in policy and create the topics; `closing` gets what ends them."""
        links = [Link() for _ in range(PLACES)]
        for link in links:
            await link.listen()
            closing.callback(link.cut)
        self = cls(folder, seed, delivery, links)
        for link in links:
            link.target = self.broker.behind[link.port]
        closing.callback(self.store.kill)
        closing.callback(self.valkey.kill)
        closing.callback(self.broker.kill)
        await asyncio.gather(asyncio.to_thread(self.valkey.start), asyncio.to_thread(self.broker.start))
        await asyncio.to_thread(self.store.start, self.settings.policy_bucket)
        publisher = await open_publisher(StreamConfig.from_settings(self.settings))  # which creates the topics
        await publisher.close()
        return self

    @property
    def pictures(self) -> Pictures:
        return self.store.pictures

    @property
    def environment(self) -> dict[str, str]:
        """Of a member, and of the command line."""
        return environment_of(self.settings)
