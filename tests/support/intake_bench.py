"""An intake on real parts (Valkey, an S3 server, the image decoders), with a fake guard."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar

import boto3
import pytest

from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.replayed_attempts import ReplayedAttempts
from pipelines.intake.worker import IntakeWorker
from pipelines.tiny_guard.drawings import draw
from services.core.messages import DeadLetter, Verdict
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.traffic_sample import TrafficSample
from services.streams.base import Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer, open_publisher, open_reader
from tests.support.fake_guard import FakeGuard
from tests.support.streams_bench import reach

T = TypeVar("T")


class IntakeBench:
    """The streams and the bucket of one test, and the intake between them."""

    def __init__(self, settings: Settings, guard: FakeGuard) -> None:
        self.settings = settings
        self.guard = guard
        self.s3: Any = boto3.client("s3", endpoint_url=settings.s3_endpoint)
        self.registry = PolicyRegistry(self.s3, settings.policy_bucket)
        self.redis_cache = PolicyRedisCache.from_settings(settings)
        self.intakes: list[IntakeWorker] = []
        self._closing = AsyncExitStack()

    async def start(
        self, endpoint: str | None = None, *, with_backfill: bool = False, **overrides: Any
    ) -> IntakeWorker:
        """Start an intake member. `endpoint` is the address of another S3 server for it."""
        settings = self.settings.model_copy(update=overrides | ({"s3_endpoint": endpoint} if endpoint else {}))
        store, preparer = ObjectStore(settings), DecoderPool(settings, 384)
        self._closing.callback(store.close)
        self._closing.callback(preparer.close)
        self.policies = policies = await self._entered(
            PolicyCache(self.registry, self.redis_cache, refresh_s=settings.policy_refresh_s)
        )
        moderator = build_retrying_moderator(
            policies=policies,
            images=store,
            preparer=preparer,
            guard=self.guard,
            breaker=await self._entered(CircuitBreaker(policies, self.registry, self.redis_cache)),
        )
        sample = await self._entered(TrafficSample(self.redis_cache, size=settings.sample_size))
        member = f"m-{len(self.intakes)}"
        backfill = await open_consumer(StreamConfig.for_backfill(settings), member) if with_backfill else None
        isolation = await self._entered(CrashIsolation(self.redis_cache, settings.group, member))
        intake = IntakeWorker(
            await open_consumer(StreamConfig.from_settings(settings), member),
            moderator,
            settings,
            isolation,
            sample,
            backfill,
            ReplayedAttempts(self.redis_cache, settings.dead_letters_stream),
        )
        self.intakes.append(intake)
        return intake

    async def _entered(self, entered: AbstractAsyncContextManager[T]) -> T:
        return await self._closing.enter_async_context(entered)

    def put(self, key: str, data: bytes | None = None) -> str:
        """Upload (a drawn image unless given) and return the ETag."""
        body = draw(len(key)).jpeg if data is None else data
        return str(self.s3.put_object(Bucket="uploads", Key=key, Body=body)["ETag"]).strip('"')

    async def submit(
        self, value: bytes | dict[str, Any], key: bytes | None = None, stream: str = "", **headers: bytes
    ) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        publisher = await open_publisher(StreamConfig.from_settings(self.settings))
        await publisher.publish(
            [OutgoingMessage(stream or self.settings.submissions_stream, body, key, tuple(headers.items()))]
        )
        await publisher.close()

    async def verdicts(self) -> list[Verdict]:
        return [Verdict.model_validate_json(m.value) for m in await self.read(self.settings.verdicts_stream)]

    async def letters(self) -> list[DeadLetter]:
        return [DeadLetter.from_headers(m.headers) for m in await self.read(self.settings.dead_letters_stream)]

    async def read(self, stream: str) -> list[Message]:
        reader = await open_reader(StreamConfig.from_settings(self.settings))
        try:
            return [message async for message in reader.read(stream, follow=False)]
        finally:
            await reader.close()

    async def settled(self, count: int, stalled_s: float = 30.0) -> tuple[list[Verdict], list[DeadLetter]]:
        """Wait until `count` submissions have an outcome. It fails when no more have one within `stalled_s`."""
        found: tuple[list[Verdict], list[DeadLetter]] = ([], [])

        async def settled() -> int:
            nonlocal found
            found = await self.verdicts(), await self.letters()
            return sum(map(len, found))

        async def describe() -> str:
            return f"{len(found[0])} verdicts and {len(found[1])} dead letters"

        await reach(count, settled, stalled_s=stalled_s, describe=describe)
        return found

    async def close(self) -> None:
        for intake in self.intakes:
            await intake.drain()
        await self._closing.aclose()
        await self.redis_cache.close()


def empty_bucket(s3: Any, name: str) -> None:
    if name not in {found["Name"] for found in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=name)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
        for found in page.get("Contents", ()):
            s3.delete_object(Bucket=name, Key=found["Key"])


@pytest.fixture
async def bench(valkey_url: str, s3_endpoint: str) -> AsyncIterator[IntakeBench]:
    """A bench whose guard says Safe until a test changes its script. No intake runs yet."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    settings = Settings(
        stream_url=valkey_url,
        redis_url=valkey_url,
        s3_endpoint=s3_endpoint,
        s3_buckets=("uploads",),
        policy_bucket=f"{name}-policies",
        model="tiny",
        group=name,
        submissions_stream=f"{name}.submissions",
        backfill_stream=f"{name}.backfill",
        verdicts_stream=f"{name}.verdicts",
        dead_letters_stream=f"{name}.dead-letters",
        shadow_verdicts_stream=f"{name}.shadow-verdicts",
        drain_s=5,
        redis_claim_idle_s=2,
        image_limit_bytes=2 << 20,
        fetch_deadline_s=3,
    )
    bench = IntakeBench(settings, FakeGuard())
    empty_bucket(bench.s3, "uploads")
    empty_bucket(bench.s3, settings.policy_bucket)
    bench.registry.publish_built_in()
    yield bench
    await bench.close()
