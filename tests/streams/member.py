"""A member to be killed: joins with the settings in its argument (JSON), receives, and never settles."""

import asyncio
import sys

from services.core.settings import Settings
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer


async def main() -> None:
    transport = await open_consumer(StreamConfig.from_settings(Settings.model_validate_json(sys.argv[1])), "doomed")
    while True:
        for message in await transport.receive(100, 1.0):
            print("received", message.value.decode(), flush=True)  # noqa: T201 - the test reads it


asyncio.run(main())
