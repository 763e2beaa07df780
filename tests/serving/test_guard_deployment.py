"""The guard behind a Serve handle: in this process on a fake engine, and once on a Ray cluster with the real one."""

import asyncio
import os
import signal
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from pipelines.serving import guard_deployment
from pipelines.serving.guard_client import ServeGuardClient
from pipelines.serving.guard_deployment import GuardDeployment
from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.core.settings import Settings
from services.core.values import Assessment, ModelIdentity
from services.guard.checkpoints import resolve_checkpoint
from tests.support.engine import drawn, policy, prepared

pytestmark = pytest.mark.filterwarnings(  # Serve awaits it; the garbage collector calls it a second time
    "ignore:coroutine 'GuardDeployment.__del__' was never awaited:RuntimeWarning"
)


def settings(state_dir: Path, **changes: Any) -> Settings:
    return Settings(
        stream_url="redis://localhost",
        redis_url="redis://localhost",
        s3_buckets="uploads",
        policy_bucket="policies",
        model="tiny",
        state_dir=state_dir,
        **changes,
    )


class FakeEngine:
    """Generates what a test tells it to."""

    down_s = 0.0
    state = "ready"
    revision = "sha256:0"
    in_flight = 16
    stopped = 0
    generates: Any = None

    def __init__(self) -> None:
        self.checkpoint = resolve_checkpoint("tiny")
        self.calls = 0

    @classmethod
    def from_settings(cls, _: Settings) -> "FakeEngine":
        return cls()

    async def __aenter__(self) -> "FakeEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        type(self).stopped += 1

    async def health_check(self) -> None:
        pass

    def read_config(self) -> dict[str, Any]:
        return {}

    async def tokenize(self, text: str) -> list[int]:
        return [1, 7] if text.endswith("Unsafe") else [1, 3] if text.endswith("Safe") else [1]

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.generates, Exception):
            raise self.generates
        self.calls += 1
        logprobs = [[[-0.1, 3, None], [-2.3 - 1e-9 * self.calls, 7, None]]]
        return {"text": "", "meta_info": self.generates | {"output_token_ids_logprobs": logprobs}}


ONE_TOKEN = {
    "finish_reason": {"type": "length"},
    "prompt_tokens": 10,
    "cached_tokens": 2,
    "completion_tokens": 1,
}


@pytest.fixture(autouse=True)
def _fake_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("engine"):
        return
    monkeypatch.setattr(guard_deployment, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "generates", ONE_TOKEN)


@pytest.fixture
def guard(tmp_path: Path) -> ServeGuardClient:
    """A guard in this process, on a fake engine."""
    handle = serve.run(
        GuardDeployment.bind(settings(tmp_path)),
        name="guard-test",
        route_prefix=None,
        _local_testing_mode=True,
    )
    return ServeGuardClient(handle, deadline_s=20)


async def start_replica(tmp_path: Path, **changes: Any) -> Any:
    """Start a replica without Serve."""
    replica = object.__new__(GuardDeployment.func_or_class)
    await replica.__init__(settings(tmp_path, **changes))
    return replica


async def test_serve_guard_client_returns_the_assessment(guard: ServeGuardClient) -> None:
    (assessment,) = await guard.assess_each(drawn(1), [policy()], "score")
    assert assessment.score == pytest.approx(0.0998, abs=1e-3)
    assert assessment.rating == "Safe"
    assert await guard.max_side_px() == resolve_checkpoint("tiny").max_side_px


async def test_serve_guard_client_with_several_policies_returns_an_assessment_for_each(guard: ServeGuardClient) -> None:
    each = await guard.assess_each(drawn(1), [policy(), policy(prompt="Be kind.")], "score")
    assert [type(assessment) for assessment in each] == [Assessment, Assessment]
    assert each[0].model.prompt != each[1].model.prompt
    assert await guard.assess_each(drawn(1), [], "score") == []


@pytest.mark.parametrize(
    "error",
    [GuardFailed("It is garbage."), GuardUnavailable("It is gone."), UnreadableAnswer("It mumbles.")],
    ids=lambda error: type(error).__name__,
)
async def test_serve_guard_client_raises_the_replicas_own_error(
    guard: ServeGuardClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(FakeEngine, "generates", error)
    with pytest.raises(type(error)) as caught:
        await guard.assess_each(drawn(1), [policy()], "verdict")
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert guard.in_flight == 0


async def test_replica_is_unhealthy_only_after_a_whole_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await start_replica(tmp_path, guard_start_s=100)
    replica.check_health()
    monkeypatch.setattr(FakeEngine, "down_s", 99)
    replica.check_health()
    monkeypatch.setattr(FakeEngine, "down_s", 101)
    with pytest.raises(GuardUnavailable, match="101 s"):
        replica.check_health()


async def test_replica_reconfigured_keeps_its_engine(tmp_path: Path) -> None:
    replica = await start_replica(tmp_path)
    engine = replica._inference.engine
    replica.reconfigure({"guard_in_flight": 3})
    assert replica._inference.engine is engine
    with pytest.raises(ConfigurationError, match="cannot change model of a running guard"):
        replica.reconfigure({"model": "other"})


async def test_replica_stops_its_engine_at_the_end(tmp_path: Path) -> None:
    replica = await start_replica(tmp_path)
    before = FakeEngine.stopped
    await replica.__del__()
    assert FakeEngine.stopped == before + 1


async def test_replica_that_cannot_start_stops_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def give_one_token_for_everything(_: FakeEngine, text: str) -> list[int]:
        return [1]

    monkeypatch.setattr(FakeEngine, "tokenize", give_one_token_for_everything)
    before = FakeEngine.stopped
    with pytest.raises(ConfigurationError):
        await start_replica(tmp_path)
    assert FakeEngine.stopped == before + 1


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(900)
async def test_guard_on_a_ray_cluster_survives_the_death_of_its_replica(tmp_path: Path) -> None:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        one = GuardDeployment.options(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=16)
        handle = serve.run(one.bind(settings(tmp_path, guard_in_flight=2)), name="guard-test", route_prefix=None)
        guard = ServeGuardClient(handle, deadline_s=120)
        judged_by = policy()
        # Policies come from the registry with a read-only mapping.
        object.__setattr__(judged_by, "category_thresholds", MappingProxyType({}))
        (assessment,) = await guard.assess_each(drawn(1), [judged_by], "verdict")
        assert isinstance(assessment, Assessment)
        assert isinstance(assessment.model, ModelIdentity)

        first, second = await guard.assess_each(drawn(1), [judged_by, policy("never")], "score")
        assert first.score == pytest.approx(second.score, abs=1e-5)

        with pytest.raises(GuardFailed) as caught:
            await guard.assess_each(prepared(b"garbage"), [judged_by], "score")
        assert type(caught.value) is GuardFailed
        assert "\n" not in str(caught.value)

        engines = [process for process in psutil.process_iter() if _is_engine_of(process, tmp_path)]
        assert engines
        owner = psutil.Process(_guardian(engines[0]).ppid())
        calls = [
            asyncio.create_task(guard.assess_each(drawn(seed), [policy("always")], "verdict")) for seed in range(8)
        ]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)  # most of the others still wait in the replica
        os.kill(owner.pid, signal.SIGKILL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} <= {GuardUnavailable, list}
        assert GuardUnavailable in {type(result) for result in results}
        _, left = psutil.wait_procs(engines, timeout=10)
        assert not left
    finally:
        serve.shutdown()
        ray.shutdown()
    deadline = time.monotonic() + 15
    while any(_is_engine_of(process, tmp_path) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "an engine was left behind"
        await asyncio.sleep(0.5)


def _is_engine_of(process: psutil.Process, state_dir: Path) -> bool:
    try:
        return any(str(state_dir) in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def _guardian(process: psutil.Process) -> psutil.Process:
    while "services.core.processes" not in process.cmdline():
        parent = process.parent()
        assert parent is not None
        process = parent
    return process
