"""A guard replica on a machine whose GPU the engine cannot use."""

from typing import Any

import pytest

from pipelines.serving import guard_deployment
from pipelines.serving.guard_deployment import GuardDeployment
from services.core.errors import ConfigurationError
from services.guard.gpu_memory import GIB
from services.guard.preflight import Gpu, GpuMachine
from tests.support.images import make_settings


@pytest.mark.filterwarnings("ignore:coroutine '.*__del__' was never awaited")  # Serve makes it async
@pytest.mark.parametrize("guard_gpus", [None, 1, 0])
async def test_replica_on_a_machine_that_cannot_compile_names_the_cause_before_it_starts_an_engine(
    guard_gpus: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def start(_: Any) -> None:
        raise Started

    machine = GpuMachine(gpus=(Gpu("NVIDIA L40S", 44 * GIB, (8, 9)),), driver="580.95.05")
    monkeypatch.setattr(guard_deployment, "read_machine", lambda: machine)
    monkeypatch.setattr(guard_deployment, "protect_replica", lambda: None)
    monkeypatch.setattr(guard_deployment.Engine, "from_settings", start)
    replica: Any = GuardDeployment.func_or_class

    # Without a GPU for the replica, the engine runs on the CPU and compiles nothing.
    with pytest.raises(Started if guard_gpus == 0 else ConfigurationError) as raised:
        await replica.__init__(object.__new__(replica), make_settings(guard_gpus=guard_gpus))

    if guard_gpus != 0:
        assert "nvcc is not installed" in str(raised.value)
