"""Readiness: why a gateway is not ready, and what /readyz tells clients."""

import asyncio

import pytest

from services.core.errors import GuardUnavailable
from services.core.values import Assessment, Detail, PreparedImage
from tests.support.fake_guard import says_safe
from tests.support.gateway_bench import JPEG, GatewayBench


async def is_unavailable(_image: PreparedImage, _detail: Detail) -> Assessment:
    raise GuardUnavailable("the engine is starting")


async def has_a_bug(_image: PreparedImage, _detail: Detail) -> Assessment:
    raise ZeroDivisionError("secret")


async def test_gateway_is_ready_after_the_guard_has_judged_a_test_image(bench: GatewayBench) -> None:
    await bench.app.state.readiness.refresh()
    async with bench.client() as client:
        answers = [await client.get(path) for path in ("/healthz", "/readyz")]
    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(200, "ok"), (200, "ready")]
    assert set(bench.guard.calls) == {"score"}


async def test_gateway_without_a_guard_is_not_ready_and_becomes_ready_with_it(idle: GatewayBench) -> None:
    idle.guard.script = is_unavailable
    await idle.start()
    readiness = idle.app.state.readiness
    await readiness.refresh()
    assert readiness.not_ready_reason == "the engine is starting"
    async with idle.client() as client:
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "engine" not in refused.text, "clients without a key do not see the reason"
        assert (await client.get("/healthz")).status_code == 200
        idle.guard.script = says_safe
        await readiness.refresh()
        assert (await client.get("/readyz")).status_code == 200


async def test_unexpected_error_of_the_probe_is_logged_and_not_shown(
    idle: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    idle.guard.script = has_a_bug
    await idle.start()
    await idle.app.state.readiness.refresh()
    assert idle.app.state.readiness.not_ready_reason == "the gateway failed; its log has the error"
    assert "the readiness probe failed" in caplog.text


async def test_busy_guard_that_judges_requests_is_ready(bench: GatewayBench) -> None:
    """The test image waits behind those of requests. Only a guard that judges nothing makes the gateway not ready."""

    is_probing, was_answered = asyncio.Event(), asyncio.Event()

    async def is_late(_image: PreparedImage, _detail: Detail) -> Assessment:
        is_probing.set()
        await was_answered.wait()
        raise TimeoutError  # as the deadline does

    async def hangs(_image: PreparedImage, _detail: Detail) -> Assessment:
        await asyncio.Event().wait()
        raise AssertionError

    readiness = bench.app.state.readiness
    await readiness.refresh()
    bench.guard.script = is_late
    probing = asyncio.create_task(readiness.probe())
    async with asyncio.timeout(20):
        await is_probing.wait()
    bench.guard.script = says_safe
    async with bench.client() as client:
        answer = await client.post("/v1/assessments?wait=10", files={"file": ("a.jpg", JPEG)})
        assert answer.status_code == 200
    was_answered.set()
    assert await probing == ""
    bench.guard.script = hangs
    readiness._deadline_s = 0.3
    assert "did not judge a test image" in await readiness.probe()
