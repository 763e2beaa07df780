"""A gateway on real parts (Valkey, an S3 server, the image decoders), with a scripted guard."""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import boto3
import httpx
import pytest

from pipelines.tiny_guard.drawings import draw
from services.core.settings import Settings
from services.core.values import CATEGORIES, Assessment, Detail, PreparedImage
from services.gateway.api_keys import ApiKeyRegistry, Role
from services.gateway.app import Dependencies, create_app
from services.gateway.server import GatewayServer, listen
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying import build_retrying_moderator
from services.policies.cache import PolicyCache
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
    """A guard's script that waits until it is opened; `waiting` are those that are there."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.waiting = 0

    async def __call__(self, image: PreparedImage, detail: Detail) -> Assessment:
        if detail == "score":  # the gateway's own look whether the guard is there
            return await says_safe(image, detail)
        self.waiting += 1
        await self.opened.wait()
        return unsafe()

    async def until_waiting(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.waiting < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


class Bench:
    """The parts of one gateway, and clients of it."""

    def __init__(self, settings: Settings, preparer: DecoderPool) -> None:
        self.settings = settings
        self.guard = FakeGuard()
        self.preparer = preparer
        self.s3: Any = boto3.client("s3", endpoint_url=settings.s3_endpoint)
        self.registry = PolicyRegistry(self.s3, settings.policy_bucket)
        self.keys = ApiKeyRegistry(self.s3, settings.policy_bucket)
        self.app: Any = None
        self._closing = AsyncExitStack()
        self._tokens: dict[tuple[str, str], str] = {}

    def configure(self, **changes: Any) -> None:
        """Before `start`."""
        self.settings = self.settings.model_copy(update=changes)

    async def start(self) -> None:
        """Build the application and begin its lifespan."""
        self.app = await self._built()
        await self._closing.enter_async_context(self.app.router.lifespan_context(self.app))

    async def serve(self) -> GatewayServer:
        """The application on a port of its own."""
        self.app = await self._built()
        server = GatewayServer(self.app, self.settings, listener=listen("127.0.0.1", 0), head_deadline_s=1.0)
        self._closing.push_async_callback(server.stop)
        await server.start()
        return server

    async def _built(self) -> Any:
        store = ObjectStore(self.settings)
        self._closing.callback(store.close)
        shared = PolicyRedisCache(self.settings.redis_url, self.settings.policy_bucket)
        self._closing.push_async_callback(shared.close)
        cache = PolicyCache(self.registry, shared, refresh_s=self.settings.policy_refresh_s)
        policies = await self._closing.enter_async_context(cache)
        parts = Dependencies(
            moderator=build_retrying_moderator(
                policies=policies, images=store, preparer=self.preparer, guard=self.guard
            ),
            guard=self.guard,
            preparer=self.preparer,
            policies=policies,
            registry=self.registry,
            redis_cache=shared,
            keys=self.keys,
        )
        return create_app(parts, self.settings)

    def token(self, role: Role = "moderate", tenant: str = "default") -> str:
        """The API key of a role and a tenant."""
        if (role, tenant) not in self._tokens:
            _, self._tokens[role, tenant] = self.keys.create(f"{role} of {tenant}", role, tenant=tenant)
        return self._tokens[role, tenant]

    def client(self, role: Role = "moderate", tenant: str = "default", **headers: str) -> httpx.AsyncClient:
        """A client in this process; what the application raises comes as the answer that a server gives."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://gateway",
            headers={"Authorization": f"Bearer {self.token(role, tenant)}", **headers},
            timeout=30,
        )

    def put(self, key: str, data: bytes = JPEG) -> str:
        """Upload to the bucket that may be read; the object's URI."""
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
async def _bench(valkey_url: str, s3_endpoint: str, preparer: DecoderPool) -> AsyncIterator[Bench]:
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
    bench = Bench(settings, preparer)
    for name in ("uploads", settings.policy_bucket):
        if name not in {found["Name"] for found in bench.s3.list_buckets()["Buckets"]}:
            bench.s3.create_bucket(Bucket=name)
    bench.registry.publish_built_in()
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
async def idle(valkey_url: str, s3_endpoint: str, preparer: DecoderPool) -> AsyncIterator[Bench]:
    """A gateway that is to be configured and started; its guard says Safe until told otherwise."""
    async with _bench(valkey_url, s3_endpoint, preparer) as bench:
        yield bench


@pytest.fixture
async def bench(idle: Bench) -> Bench:
    """A gateway that runs."""
    await idle.start()
    return idle
