"""The guard behind a Serve handle: in this process with a made-up engine, and once on a real Ray."""

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

from pipelines.serving import guard_deployment as deployment
from pipelines.serving.guard_client import RemoteGuard
from pipelines.serving.guard_deployment import GuardDeployment
from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.core.settings import Settings
from services.core.values import Assessment, ModelIdentity
from services.guard.checkpoints import resolve
from tests.support.engine import drawn, policy, prepared


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
    """Says what a test wants it to say."""

    down_s = 0.0
    state = "ready"
    revision = "sha256:0"
    stopped = 0
    generates: Any = None

    def __init__(self) -> None:
        self.checkpoint = resolve("tiny")

    @classmethod
    def from_settings(cls, _: Settings) -> "FakeEngine":
        return cls()

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def stop(self) -> None:
        type(self).stopped += 1

    async def health_check(self) -> None:
        pass

    async def tokenize(self, text: str) -> list[int]:
        return [1, 7] if text.endswith("Unsafe") else [1, 3] if text.endswith("Safe") else [1]

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.generates, Exception):
            raise self.generates
        return {"text": "", "meta_info": self.generates}


ONE_TOKEN = {
    "output_token_ids_logprobs": [[[-0.1, 3, None], [-2.3, 7, None]]],
    "finish_reason": {"type": "length"},
    "prompt_tokens": 10,
    "cached_tokens": 2,
    "completion_tokens": 1,
}


@pytest.fixture
def fake_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteGuard:
    monkeypatch.setattr(deployment, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "generates", ONE_TOKEN)
    handle = serve.run(
        GuardDeployment.bind(settings(tmp_path)),
        name="guard-test",
        route_prefix=None,
        _local_testing_mode=True,
    )
    return RemoteGuard(handle, deadline_s=20)


class TestInThisProcess:
    async def test_an_assessment_comes_back(self, fake_guard: RemoteGuard) -> None:
        assessment = await fake_guard.assess(drawn(1), policy(), "score")
        assert assessment.score == pytest.approx(0.0998, abs=1e-3)
        assert assessment.rating == "Safe"
        assert await fake_guard.max_side_px() == resolve("tiny").max_side_px

    async def test_an_assessment_for_each_policy(self, fake_guard: RemoteGuard) -> None:
        each = await fake_guard.assess_each(drawn(1), [policy(), policy(prompt="Be kind.")], "score")
        assert [type(assessment) for assessment in each] == [Assessment, Assessment]
        assert each[0].model.prompt != each[1].model.prompt
        assert await fake_guard.assess_each(drawn(1), [], "score") == []

    @pytest.mark.parametrize(
        "error",
        [GuardFailed("It is garbage."), GuardUnavailable("It is gone."), UnreadableAnswer("It mumbles.")],
        ids=lambda error: type(error).__name__,
    )
    async def test_errors_come_as_they_are(self, fake_guard, monkeypatch, error) -> None:
        monkeypatch.setattr(FakeEngine, "generates", error)
        with pytest.raises(type(error)) as caught:
            await fake_guard.assess(drawn(1), policy(), "verdict")
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)


async def replica(tmp_path: Path, **changes: Any) -> Any:
    made = object.__new__(GuardDeployment.func_or_class)
    await made.__init__(settings(tmp_path, **changes))
    return made


class TestTheReplica:
    @pytest.fixture(autouse=True)
    def _made_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deployment, "Engine", FakeEngine)
        monkeypatch.setattr(FakeEngine, "generates", ONE_TOKEN)

    @pytest.fixture
    async def replica(self, tmp_path: Path) -> Any:
        return await replica(tmp_path, guard_start_s=100)

    async def test_is_unhealthy_only_after_a_whole_start(self, replica, monkeypatch) -> None:
        await replica.check_health()
        monkeypatch.setattr(FakeEngine, "down_s", 99)
        await replica.check_health()
        monkeypatch.setattr(FakeEngine, "down_s", 101)
        with pytest.raises(GuardUnavailable, match="101 s"):
            await replica.check_health()

    async def test_reconfigure_keeps_the_engine(self, replica) -> None:
        engine = replica._engine
        replica.reconfigure({"guard_in_flight": 3})
        assert replica._guard.engine is engine
        with pytest.raises(ConfigurationError, match="model"):
            replica.reconfigure({"model": "other"})

    async def test_stops_its_engine(self, replica) -> None:
        before = FakeEngine.stopped
        await replica.__del__()
        assert FakeEngine.stopped == before + 1


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_on_a_real_ray(tmp_path: Path) -> None:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        one = GuardDeployment.options(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=16)
        handle = serve.run(one.bind(settings(tmp_path)), name="guard-test", route_prefix=None)
        guard = RemoteGuard(handle, deadline_s=120)
        judged_by = policy()
        # Policies come from the registry with a read-only mapping.
        object.__setattr__(judged_by, "category_thresholds", MappingProxyType({}))
        assessment = await guard.assess(drawn(1), judged_by, "verdict")
        assert isinstance(assessment, Assessment)
        assert isinstance(assessment.model, ModelIdentity)

        first, second = await guard.assess_each(drawn(1), [judged_by, policy("never")], "score")
        assert first.score == pytest.approx(second.score, abs=1e-5)

        with pytest.raises(GuardFailed) as caught:
            await guard.assess(prepared(b"garbage"), judged_by, "score")
        assert type(caught.value) is GuardFailed
        assert "\n" not in str(caught.value)

        engines = [process for process in psutil.process_iter() if _is_engine_of(process, tmp_path)]
        assert engines
        owner = psutil.Process(_guardian(engines[0]).ppid())
        calls = [asyncio.create_task(guard.assess(drawn(seed), policy("always"), "verdict")) for seed in range(3)]
        await asyncio.sleep(0.3)
        os.kill(owner.pid, signal.SIGKILL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} <= {GuardUnavailable, Assessment}
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
