"""Replicas of Intake and Gateway on real backends, without Serve: their start, health, recorded numbers and end."""

import gc
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve

from pipelines.serving.gateway_deployment import GatewayDeployment
from pipelines.serving.guard_client import ServeGuardClient
from pipelines.serving.intake_deployment import IntakeDeployment
from services.core.errors import ConfigurationError
from services.images.object_store import ObjectStore
from services.streams.redis.consumer import RedisGroupConsumer
from tests.support.fake_guard import FakeGuard
from tests.support.intake_bench import IntakeBench
from tests.support.ports import free_ports
from tests.support.streams_bench import eventually

MAX_SIDE_PX = 384

pytestmark = pytest.mark.filterwarnings(  # Serve awaits it; the garbage collector calls it a second time
    "ignore:coroutine '.*Deployment.__del__' was never awaited:RuntimeWarning"
)


class LocalGuard(FakeGuard):
    """A fake guard in this process, in the place of the client of the guard deployment."""

    in_flight = 3

    async def max_side_px(self) -> int:
        return MAX_SIDE_PX


@pytest.fixture(autouse=True)
def _local_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServeGuardClient, "from_settings", lambda *_: LocalGuard())
    monkeypatch.setattr(gc, "freeze", lambda: None)
    replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: replica)


@pytest.fixture
def closed_stores(monkeypatch: pytest.MonkeyPatch) -> list[ObjectStore]:
    """The object stores that were closed. Each replica has one."""
    closed: list[ObjectStore] = []
    close = ObjectStore.close

    def record(store: ObjectStore) -> None:
        closed.append(store)
        close(store)

    monkeypatch.setattr(ObjectStore, "close", record)
    return closed


def new_replica(deployment: Any) -> Any:
    return object.__new__(deployment.func_or_class)


async def test_intake_replica_judges_records_its_lag_and_closes(
    bench: IntakeBench, closed_stores: list[ObjectStore]
) -> None:
    replica = new_replica(IntakeDeployment)
    await replica.__init__(bench.settings, MAX_SIDE_PX, None)
    bench.put("a.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/a.jpg"})
    (verdict,), _ = await bench.settled(1)
    assert verdict.submission_id == "a"

    async def lag_is_recorded() -> bool:
        recorded = replica.record_autoscaling_stats()
        return recorded.get("live_published") == 1 and recorded.get("live_backlog") == 0

    await eventually(lag_is_recorded)
    assert replica.record_autoscaling_stats()["at_guard"] == LocalGuard.in_flight
    replica.check_health()
    await replica.drain()
    await replica.__del__()
    assert len(closed_stores) == 1


async def test_intake_replica_that_has_stopped_receiving_is_unhealthy(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ConfigurationError("another member has joined with the same name")

    monkeypatch.setattr(RedisGroupConsumer, "receive", refuse)
    replica = new_replica(IntakeDeployment)
    await replica.__init__(bench.settings, MAX_SIDE_PX, None)

    async def is_unhealthy() -> bool:
        try:
            replica.check_health()
        except ConfigurationError:
            return True
        return False

    await eventually(is_unhealthy)
    await replica.__del__()


async def test_intake_replica_that_cannot_start_closes_what_it_opened(
    bench: IntakeBench, closed_stores: list[ObjectStore]
) -> None:
    replica = new_replica(IntakeDeployment)
    broken = bench.settings.model_copy(update={"stream_url": "kafka://"})
    with pytest.raises(ConfigurationError):
        await replica.__init__(broken, MAX_SIDE_PX, None)
    assert len(closed_stores) == 1


async def test_gateway_replica_serves_records_its_calls_and_closes(
    bench: IntakeBench, closed_stores: list[ObjectStore]
) -> None:
    (port,) = free_ports(1)
    settings = bench.settings.model_copy(update={"gateway_host": "127.0.0.1", "gateway_port": port})
    replica = new_replica(GatewayDeployment)
    await replica.__init__(settings, MAX_SIDE_PX, None, None)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200
    assert replica.record_autoscaling_stats() == {"at_guard": LocalGuard.in_flight}
    replica.check_health()
    await replica.drain()
    with pytest.raises(RuntimeError, match="has stopped; the replica is replaced"):
        replica.check_health()
    await replica.__del__()
    assert len(closed_stores) == 1


async def test_gateway_replica_on_a_taken_port_closes_what_it_opened(
    bench: IntakeBench, closed_stores: list[ObjectStore]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = bench.settings.model_copy(
            update={"gateway_host": "127.0.0.1", "gateway_port": taken.getsockname()[1]}
        )
        replica = new_replica(GatewayDeployment)
        with pytest.raises(ConfigurationError, match="cannot listen"):
            await replica.__init__(settings, MAX_SIDE_PX, None, None)
    assert len(closed_stores) == 1
