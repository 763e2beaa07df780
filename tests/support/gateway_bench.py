"""A gateway on real backends (Valkey, an S3 server, the image decoders), with a fake guard."""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import boto3
import httpx
import pytest

from pipelines.tiny_guard.drawings import draw
from services.core.errors import RedisUnavailable
from services.core.settings import Settings
from services.core.values import CATEGORIES, Assessment, Detail, PreparedImage
from services.gateway.api_keys import ApiKeyRegistry, Role
from services.gateway.app import GatewayDependencies, create_app
from services.gateway.server import GatewayServer, listen
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from tests.support.fake_guard import MODEL, FakeGuard, says_safe

JPEG = draw(7).jpeg
OTHER_JPEG = draw(8, CATEGORIES[1]).jpeg


def data_url(data: bytes = JPEG) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def unsafe(score: float = 0.9) -> Assessment:
    return Assessment(rating="Unsafe", category=CATEGORIES[1], rationale="a fight", score=score, model=MODEL)


class Gate:
    """A script of the guard that holds all calls until `opened` is set. `calls` counts them."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.calls = 0
        self._arrived = asyncio.Condition()

    async def __call__(self, image: PreparedImage, detail: Detail) -> Assessment:
        if detail == "score":  # the readiness probe
            return await says_safe(image, detail)
        async with self._arrived:
            self.calls += 1
            self._arrived.notify_all()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return unsafe()

    async def wait_for_calls(self, count: int) -> None:
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: self.calls >= count)


class SwitchableRedisCache(PolicyRedisCache):
    """A client of Redis that a test can disconnect: while `is_down` is set, it runs no script."""

    is_down = False

    async def run(self, script: str, keys: Sequence[str], *arguments: str | bytes | float) -> Any:
        if self.is_down:
            raise RedisUnavailable("disconnected by the test")
        return await super().run(script, keys, *arguments)


async def ttl_of_assessment(redis_cache: PolicyRedisCache, assessment_id: str) -> int:
    """Return the seconds until Redis drops an assessment."""
    name = redis_cache.key("gateway", "assessment", assessment_id)
    return int(await redis_cache.run("return redis.call('TTL', KEYS[1])", [name]))


async def age_assessment(redis_cache: PolicyRedisCache, assessment_id: str, by_s: int) -> None:
    """Shorten the time to live of an assessment, as if `by_s` seconds had passed since it was renewed."""
    name = redis_cache.key("gateway", "assessment", assessment_id)
    left_s = await ttl_of_assessment(redis_cache, assessment_id) - by_s
    await redis_cache.run("redis.call('EXPIRE', KEYS[1], ARGV[1])", [name], left_s)


class GatewayBench:
    """The backends of one gateway, and its clients."""

    def __init__(self, settings: Settings, preparer: DecoderPool) -> None:
        self.settings = settings
        self.guard = FakeGuard()
        self.preparer = preparer
        self.s3: Any = boto3.client("s3", endpoint_url=settings.s3_endpoint)
        self.registry = PolicyRegistry(self.s3, settings.policy_bucket)
        self.keys = ApiKeyRegistry(self.s3, settings.policy_bucket)
        self.app: Any = None
        self.redis_cache: SwitchableRedisCache
        self._closing = AsyncExitStack()
        self._tokens: dict[tuple[str, str], str] = {}

    def configure(self, **changes: Any) -> None:
        """Change settings. Call it before `start` or `serve`."""
        self.settings = self.settings.model_copy(update=changes)

    async def start(self) -> None:
        """Build the application and start its lifespan."""
        self.app = await self._build()
        await self._closing.enter_async_context(self.app.router.lifespan_context(self.app))

    async def serve(self) -> GatewayServer:
        """Serve the application on a free port."""
        self.app = await self._build()
        server = GatewayServer(
            self.app, self.settings, listener=listen("127.0.0.1", 0), head_deadline_s=1.0, write_deadline_s=1.0
        )
        self._closing.push_async_callback(server.stop)
        await server.start()
        return server

    async def _build(self) -> Any:
        store = ObjectStore(self.settings)
        self._closing.callback(store.close)
        self.redis_cache = SwitchableRedisCache.from_settings(self.settings)
        self._closing.push_async_callback(self.redis_cache.close)
        cache = PolicyCache(self.registry, self.redis_cache, refresh_s=self.settings.policy_refresh_s)
        policies = await self._closing.enter_async_context(cache)
        breaker = await self._closing.enter_async_context(CircuitBreaker(policies, self.registry, self.redis_cache))
        dependencies = GatewayDependencies(
            moderator=build_retrying_moderator(
                policies=policies, images=store, preparer=self.preparer, guard=self.guard, breaker=breaker
            ),
            guard=self.guard,
            preparer=self.preparer,
            policies=policies,
            registry=self.registry,
            redis_cache=self.redis_cache,
            keys=self.keys,
        )
        return create_app(dependencies, self.settings)

    def share_keys_of(self, other: "GatewayBench") -> None:
        """Use the API keys of another bench with the same policy bucket."""
        self._tokens = other._tokens

    def token(self, role: Role = "moderate", tenant: str = "default") -> str:
        """Return the API key of a role and a tenant. The first call creates it."""
        if (role, tenant) not in self._tokens:
            _, self._tokens[role, tenant] = self.keys.create(f"{role} of {tenant}", role, tenant=tenant)
        return self._tokens[role, tenant]

    def client(self, role: Role = "moderate", tenant: str = "default", **headers: str) -> httpx.AsyncClient:
        """Return a client in this process. It gets errors of the application as responses, as from a server."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://gateway",
            headers={"Authorization": f"Bearer {self.token(role, tenant)}", **headers},
            timeout=30,
        )

    def put(self, key: str, data: bytes = JPEG) -> str:
        """Upload an object to the bucket that Sluice may read. Returns its URI."""
        self.s3.put_object(Bucket="uploads", Key=key, Body=data)
        return f"s3://uploads/{key}"

    async def close(self) -> None:
        await self._closing.aclose()


@pytest.fixture(scope="package")
def preparer() -> Iterator[DecoderPool]:
    preparer = DecoderPool(Settings(image_limit_px=2_000_000, decode_workers=1), 384)
    yield preparer
    preparer.close()


@asynccontextmanager
async def _bench(valkey_url: str, s3_endpoint: str, preparer: DecoderPool) -> AsyncIterator[GatewayBench]:
    settings = Settings(
        redis_url=valkey_url,
        s3_endpoint=s3_endpoint,
        s3_buckets=("uploads",),
        policy_bucket=f"gateway-{uuid.uuid4().hex[:12]}",
        gateway_body_limit_bytes=1 << 20,
        gateway_body_memory_bytes=8 << 20,
        gateway_body_deadline_s=2,
        gateway_deadline_s=10,
        gateway_keys_refresh_s=0.2,
        fetch_deadline_s=3,
        drain_s=1,
    )
    bench = GatewayBench(settings, preparer)
    for name in ("uploads", settings.policy_bucket):
        if name not in {found["Name"] for found in bench.s3.list_buckets()["Buckets"]}:
            bench.s3.create_bucket(Bucket=name)
    bench.registry.publish_built_in()
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
async def idle(valkey_url: str, s3_endpoint: str, preparer: DecoderPool) -> AsyncIterator[GatewayBench]:
    """A gateway that is not started yet. Its guard says Safe by default."""
    async with _bench(valkey_url, s3_endpoint, preparer) as bench:
        yield bench


@pytest.fixture
async def bench(idle: GatewayBench) -> GatewayBench:
    """A started gateway."""
    await idle.start()
    return idle
