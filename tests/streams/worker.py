"""A member that settles, until SIGTERM or until it kills itself in the middle of a (Kafka) transaction.

Arguments: settings (JSON), a seed, and, to die: a moment of a transaction and how many transactions to let pass before.
"""

import asyncio
import logging
import os
import random
import signal
import sys
from typing import Any

from services.core.errors import NotOwned
from services.core.settings import Settings
from services.streams.base import GroupConsumer, Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer
from services.streams.kafka.transactions import TransactionalSender

MOMENTS = ("written", "sent", "committed")
"""After the records are written; after the offsets are sent; after the commit, before its answer is read."""


def die_at(moment: str, after: int) -> None:
    """Kill this process (SIGKILL) at `moment` of a transaction, after `after` whole ones."""
    answered: Any = TransactionalSender._wait_for_result
    write: Any = TransactionalSender._write
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        if moment == "written":
            count()

    def dying_answered(self: Any, result: Any) -> None:
        committing = self._producer._transaction_manager.is_completing()
        answered(self, result)
        if (moment == "committed") is committing and moment != "written":
            count()

    TransactionalSender._write = dying_write  # type: ignore[method-assign]
    TransactionalSender._wait_for_result = dying_answered  # type: ignore[method-assign]


def outputs_of(message: Message, settings: Settings) -> list[OutgoingMessage]:
    """A verdict, and for some messages a shadow verdict, with the message's key and value."""
    records = [OutgoingMessage(settings.verdicts_stream, message.value, message.key)]
    if message.value.endswith(b"7"):
        records.append(OutgoingMessage(settings.shadow_verdicts_stream, message.value, message.key))
    return records


async def main(settings: Settings, seed: int) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    transport = await open_consumer(StreamConfig.from_settings(settings), f"worker-{seed}")
    chance = random.Random(seed)
    working: set[asyncio.Task[None]] = set()
    while not ending.is_set():
        for message in await transport.receive(max(0, settings.in_flight - len(working)), 0.1):
            task = asyncio.create_task(work(transport, message, settings, chance.uniform(0, 0.05)))
            working.add(task)
            task.add_done_callback(working.discard)
        await asyncio.sleep(0.01)
    await transport.close()
    await asyncio.gather(*working)


async def work(transport: GroupConsumer, message: Message, settings: Settings, takes_s: float) -> None:
    await asyncio.sleep(takes_s)
    try:
        await transport.settle(message, outputs_of(message, settings))
    except NotOwned:
        return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s")
    for noisy in ("kafka.cluster", "kafka.net"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if sys.argv[3:]:
        die_at(sys.argv[3], int(sys.argv[4]))
    asyncio.run(main(Settings.model_validate_json(sys.argv[1]), int(sys.argv[2])))
