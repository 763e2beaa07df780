"""One intake member as a process: settings from the environment, leaves the group on SIGTERM.

    python -m tests.faults.member NAME GUARD_PORT...

It is built as `pipelines.serving.intake_deployment` builds it, with the guard of this suite.
"""

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from typing import Final

from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.worker import IntakeWorker
from services.core.errors import Unavailable
from services.core.logs import configure_logging
from services.core.settings import load
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.traffic_sample import TrafficSample
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer
from tests.faults.guard import GuardClient

NOT_NOW: Final = 75
"""Exit status of a member that could not start because something it needs was away (EX_TEMPFAIL)."""

_CHECK_S: Final = 0.5
_SIDE_PX: Final = 384


async def main(name: str, guard_ports: list[int]) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    settings = load()
    configure_logging(None)
    async with AsyncExitStack() as closing:
        preparer, store = DecoderPool(settings, _SIDE_PX), ObjectStore(settings)
        closing.callback(preparer.close)
        closing.callback(store.close)
        bucket = PolicyRegistry.from_settings(settings)
        shared = PolicyRedisCache.from_settings(settings)
        closing.push_async_callback(shared.close)
        policies = await closing.enter_async_context(PolicyCache(bucket, shared, refresh_s=settings.policy_refresh_s))
        moderator = build_retrying_moderator(
            policies=policies,
            images=store,
            preparer=preparer,
            guard=GuardClient(guard_ports),
            breaker=await closing.enter_async_context(CircuitBreaker(policies, bucket, shared)),
        )
        sample = await closing.enter_async_context(TrafficSample(shared, size=settings.sample_size))
        isolation = await closing.enter_async_context(CrashIsolation(shared, settings.group, f"{name}-{os.getpid()}"))
        intake = IntakeWorker(
            await open_consumer(StreamConfig.from_settings(settings), name), moderator, settings, isolation, sample
        )
        closing.push_async_callback(intake.drain)
        while not ending.is_set():
            intake.check_health()
            with suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), _CHECK_S)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], [int(port) for port in sys.argv[2:]]))
    except Unavailable as error:
        print(error, file=sys.stderr)  # noqa: T201 - into its log
        sys.exit(NOT_NOW)
