"""The time that the gateway adds to the guard's own time, as a client sees it over a real connection.

    python benchmarks/gateway.py [--model LlavaGuard-v1.2-7B-OV]

The whole gateway runs: uvicorn, API keys, limits, stored assessments in a real Valkey, image decoders. The guard takes
50 ms by a timer, so the model is not measured. The client is another process. Prints the p50 and p95 of the added time
for each kind of request, and the ratio of the whole time to the guard's.
"""

import argparse
import asyncio
import base64
import gc
import io
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import httpx
import numpy as np
from PIL import Image
from ray._private.async_compat import try_install_uvloop

from pipelines.local import backends
from services.core.settings import Settings
from services.core.values import CATEGORIES, Assessment, Detail, GuardPriority, ModelIdentity, Policy, PreparedImage
from services.gateway.api_keys import ApiKeyRegistry
from services.gateway.app import GatewayDependencies, create_app
from services.gateway.server import GatewayServer, listen
from services.guard.checkpoints import resolve_checkpoint
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry

GUARD_S = 0.05
WARM_UP = 20


class TimedGuard:
    """Takes 50 ms. The rationale has the exact duration in milliseconds."""

    async def assess_each(
        self, _image: PreparedImage, policies: Sequence[Policy], _detail: Detail, _priority: GuardPriority
    ) -> list[Assessment]:
        began = time.perf_counter()
        await asyncio.sleep(GUARD_S)
        took_ms = (time.perf_counter() - began) * 1000
        model = ModelIdentity(name="timer", revision="sha256:0", engine="none", prompt="sha256:0")
        assessment = Assessment(
            rating="Unsafe", category=CATEGORIES[0], rationale=f"{took_ms:.3f}", score=0.9, model=model
        )
        return [assessment for _ in policies]


def picture(side_px: int, image_format: str) -> bytes:
    """Soft colours with some noise: about as many bytes as a picture of a text-to-image model."""
    rng = np.random.default_rng(side_px)
    small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((side_px, side_px), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(soft + rng.integers(-6, 7, soft.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, image_format, quality=90)
    return buffer.getvalue()


def requests(uri: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kinds of requests: name, path, and the arguments for httpx."""
    small, jpeg, large = (picture(side_px, "JPEG") for side_px in (224, 512, 1024))
    png = picture(1024, "PNG")
    assessments, moderations = "/v1/assessments?wait=30", "/v1/moderations"
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    yield f"upload, JPEG 224 px, {len(small) >> 10} KiB", assessments, {"files": {"file": ("a", small)}}
    yield f"upload, JPEG 512 px, {len(jpeg) >> 10} KiB", assessments, {"files": {"file": ("a", jpeg)}}
    yield f"upload, JPEG 1024 px, {len(large) >> 10} KiB", assessments, {"files": {"file": ("a", large)}}
    yield f"upload, PNG 1024 px, {len(png) >> 10} KiB", assessments, {"files": {"file": ("a", png)}}
    yield "moderations, data: URL, JPEG 512 px", moderations, {"json": {"input": [part]}}
    yield "S3 reference, JPEG 512 px", assessments, {"json": {"uri": uri}}
    once = {"headers": {"Idempotency-Key": "{n}"}}
    yield "upload, JPEG 512 px, Idempotency-Key", assessments, {"files": {"file": ("a", jpeg)}, **once}


async def measure(url: str, key: str, uri: str, count: int) -> None:
    """The client. It sends one request at a time, the kinds in turn, so that all kinds see the same load."""
    headers = {"Authorization": f"Bearer {key}"}
    kinds = list(requests(uri))
    added: dict[str, list[float]] = {name: [] for name, _, _ in kinds}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        for n in range(count + WARM_UP):
            for name, path, sent in kinds:
                more = {header: value.format(n=n) for header, value in sent.get("headers", {}).items()}
                began = time.perf_counter()
                answer = await client.post(path, **{**sent, "headers": more})
                took_ms = (time.perf_counter() - began) * 1000
                document = answer.raise_for_status().json()
                verdict = document["results"][0] if "results" in document else document
                if n >= WARM_UP:
                    added[name].append(took_ms - float(verdict["rationale"]))
    for name, milliseconds in added.items():
        p50, p95 = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
        row = {"request": name, "added_p50_ms": round(p50, 1), "added_p95_ms": round(p95, 1)}
        print(json.dumps(row | {"ratio_p50": round(1 + p50 / (GUARD_S * 1000), 2)}), flush=True)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A running gateway of this process."""

    url: str
    keys: ApiKeyRegistry


@asynccontextmanager
async def gateway(model: str, **changes: Any) -> AsyncIterator[RunningGateway]:
    """Run the whole gateway with a timed guard, and its backends as children. `changes` override default settings."""
    async with AsyncExitStack() as closing:
        environment = closing.enter_context(backends.start_backends({"SLUICE_MODEL": model}))
        os.environ.update(environment)
        settings = Settings(**changes)
        boto3.client("s3", endpoint_url=settings.s3_endpoint).put_object(
            Bucket="uploads", Key="a.jpg", Body=picture(512, "JPEG")
        )
        registry, keys = PolicyRegistry.from_settings(settings), ApiKeyRegistry.from_settings(settings)
        registry.publish_built_in()
        shared = PolicyRedisCache.from_settings(settings)
        closing.push_async_callback(shared.close)
        preparer, store = DecoderPool(settings, resolve_checkpoint(model).max_side_px), ObjectStore(settings)
        closing.callback(preparer.close)
        closing.callback(store.close)
        policies = await closing.enter_async_context(PolicyCache(registry, shared))
        guard = TimedGuard()
        moderator = build_retrying_moderator(policies=policies, images=store, preparer=preparer, guard=guard)
        dependencies = GatewayDependencies(moderator, guard, preparer, policies, registry, shared, keys)
        server = GatewayServer(create_app(dependencies, settings), settings, listener=listen("127.0.0.1", 0))
        closing.push_async_callback(server.stop)
        await server.start()
        gc.collect()
        gc.freeze()  # as the deployment does
        print(
            f"guard {GUARD_S * 1000:.0f} ms; images up to {resolve_checkpoint(model).max_side_px} px", file=sys.stderr
        )
        yield RunningGateway(f"http://127.0.0.1:{server.port}", keys)


async def serve(model: str, count: int) -> int:
    """Run the gateway here and the client as another process; return the client's exit status."""
    async with gateway(model, gateway_rate_per_s=100_000) as running:
        _, key = running.keys.create("benchmark", "moderate")
        command = [sys.executable, __file__, "--measure", running.url, key, "s3://uploads/a.jpg", "--count", str(count)]
        client = await asyncio.create_subprocess_exec(*command)
        return await client.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="checkpoint that decides the size of prepared images")
    parser.add_argument("--count", type=int, default=200, help="requests of each kind")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        asyncio.run(measure(*given.measure, given.count))
    else:
        try_install_uvloop()  # the loop that Ray gives its workers
        sys.exit(asyncio.run(serve(given.model, given.count)))


if __name__ == "__main__":
    main()
