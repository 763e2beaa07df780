"""A member to be killed: joins with the settings in its argument (JSON), receives, and never settles.

With a second argument it kills itself when its first partition is revoked (Kafka), before it tells the group.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from services.core.settings import Settings
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer
from services.streams.kafka.rebalance import Rebalance


def die_on_revocation() -> None:
    async def die(_self: Any, _revoked: set[Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Rebalance.on_partitions_revoked = die  # type: ignore[method-assign]


async def main() -> None:
    transport = await open_consumer(StreamConfig.from_settings(Settings.model_validate_json(sys.argv[1])), "doomed")
    while True:
        for message in await transport.receive(100, 1.0):
            print("received", message.value.decode(), flush=True)  # noqa: T201 - the test reads it


if sys.argv[2:]:
    die_on_revocation()
asyncio.run(main())
