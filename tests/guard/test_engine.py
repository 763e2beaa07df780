"""The engine: start, failures of its server, and the end of its owner."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from services.core.errors import ConfigurationError, GuardUnavailable
from services.guard import sglang_command as launch
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.sglang_server import SglangServer
from tests.support.engine import SharedGuard, drawn, policy
from tests.support.processes import are_gone

ROOT = Path(__file__).parents[2]


def family(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


def scheduler(pid: int) -> psutil.Process:
    (found,) = [process for process in family(pid) if "scheduler" in process.name()]
    return found


async def until(engine: Engine, state: str, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while engine.state != state:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def fake_server(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run this Python text instead of SGLang; its `port` is the one to listen on."""
    monkeypatch.setattr(
        launch.LaunchConfig,
        "command",
        lambda _, port, secrets: [sys.executable, "-c", f"port = {port}\n{script}"],
    )
    monkeypatch.setattr("services.guard.engine.plan_gpus", lambda *_: None)


class TestStart:
    async def test_call_before_the_start_is_unavailable(self, tmp_path: Path) -> None:
        engine = Engine(resolve_checkpoint("tiny"), state_dir=tmp_path)
        with pytest.raises(GuardUnavailable, match="stopped"):
            await engine.generate({})
        with pytest.raises(GuardUnavailable):
            _ = engine.revision

    async def test_checkpoint_too_large_for_the_machine_is_rejected_before_staging(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("services.guard.gpus.read_gpu_memory_bytes", list)
        monkeypatch.setattr("services.guard.engine.stage", lambda *_: pytest.fail("staged"))
        engine = Engine(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), state_dir=tmp_path)
        with pytest.raises(ConfigurationError, match="too many for a CPU"):
            await engine.start()
        assert engine.state == "stopped"

    async def test_server_that_exits_is_reported_with_its_last_log_line(self, tmp_path, monkeypatch) -> None:
        fake_server(monkeypatch, "print('no such kernel'); raise SystemExit(7)")
        engine = Engine(resolve_checkpoint("tiny"), state_dir=tmp_path)
        with pytest.raises(GuardUnavailable, match=r"status 7 .*\.log ends with: no such kernel"):
            await engine.start()
        assert engine.state == "stopped"
        assert engine.pid is None

    async def test_server_that_never_listens_is_killed_after_the_start_limit(self, tmp_path, monkeypatch) -> None:
        fake_server(monkeypatch, "import time; print('loading', flush=True); time.sleep(60)")
        engine = Engine(resolve_checkpoint("tiny"), state_dir=tmp_path, start_s=2)
        before = psutil.Process().children(recursive=True)  # servers of other tests
        with pytest.raises(GuardUnavailable, match="not ready after 2 s"):
            await engine.start()
        assert set(psutil.Process().children(recursive=True)) <= set(before)

    async def test_taken_port_is_replaced(self, tmp_path, monkeypatch) -> None:
        fake_server(monkeypatch, "raise SystemExit('[Errno 98] Address already in use')")
        spawned = []
        spawn = SglangServer.spawn

        async def counted(launch_config: launch.LaunchConfig, log: Path) -> SglangServer:
            spawned.append(log)
            return await spawn(launch_config, log)

        monkeypatch.setattr(SglangServer, "spawn", counted)
        with pytest.raises(GuardUnavailable, match="port was taken 3 times"):
            await Engine(resolve_checkpoint("tiny"), state_dir=tmp_path).start()
        assert len(spawned) == 3

    async def test_cancelled_start_leaves_no_process(self, tmp_path, monkeypatch) -> None:
        fake_server(monkeypatch, "import time; time.sleep(60)")
        engine = Engine(resolve_checkpoint("tiny"), state_dir=tmp_path)
        starting = asyncio.create_task(engine.start())
        while engine.pid is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        processes = family(engine.pid)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert are_gone(processes, within_s=60)
        assert engine.state == "stopped"


@pytest.mark.engine
@pytest.mark.timeout(900)
class TestRealServer:
    async def test_request_without_the_key_is_rejected(self, engine: SharedGuard) -> None:
        pid = engine.engine.pid
        assert pid is not None
        server = engine.engine._server
        assert server is not None
        url = server._client.base_url
        async with httpx.AsyncClient(trust_env=False) as stranger:
            answer = await stranger.post(f"{url}/generate", json={"text": "a"})
        assert answer.status_code == 401
        assert not any("api-key" in argument for process in family(pid) for argument in process.cmdline())

    async def test_all_processes_of_the_engine_listen_on_loopback_only(self, engine: SharedGuard) -> None:
        pid, server = engine.engine.pid, engine.engine._server
        assert pid is not None
        assert server is not None
        await engine.assess(drawn(1), policy(), "score")
        sockets = [
            connection
            for process in family(pid)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
        ]
        assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}
        assert server._client.base_url.port in {connection.laddr.port for connection in sockets}

    async def test_idle_engine_uses_little_cpu(self, engine: SharedGuard) -> None:
        pid = engine.engine.pid
        assert pid is not None
        await engine.assess(drawn(1), policy(), "score")
        before = scheduler(pid).cpu_times()
        await asyncio.sleep(4)
        after = scheduler(pid).cpu_times()
        assert after.user + after.system - before.user - before.system < 2

    async def test_killed_scheduler_fails_only_calls_in_flight(self, engine: SharedGuard) -> None:
        pid = engine.engine.pid
        assert pid is not None
        before = family(pid)
        calls = [
            asyncio.create_task(engine.assess(drawn(200 + seed), policy("always"), "verdict")) for seed in range(4)
        ]
        await asyncio.sleep(0.3)
        for log in engine.engine._state_dir.glob("logs/*"):
            log.unlink()  # the folder is "safe to delete"
        scheduler(pid).kill()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, GuardUnavailable) for result in results)
        await until(engine.engine, "restarting", 30)
        with pytest.raises(GuardUnavailable, match="restarting"):
            await engine.assess(drawn(1), policy(), "score")
        assert engine.engine.down_s > 0
        await until(engine.engine, "ready", 400)
        assert engine.engine.down_s == 0
        assert 0 <= (await engine.assess(drawn(1), policy(), "score")).score <= 1
        assert are_gone(before, within_s=60)

    async def test_hanging_scheduler_is_restarted(self, engine: SharedGuard) -> None:
        pid = engine.engine.pid
        assert pid is not None
        before = family(pid)
        scheduler(pid).suspend()
        call = asyncio.create_task(engine.assess(drawn(300), policy("always"), "verdict"))
        await until(engine.engine, "restarting", 60)
        with pytest.raises(GuardUnavailable):
            await call
        await until(engine.engine, "ready", 400)
        assert are_gone(before, within_s=60)
        await engine.assess(drawn(300), policy(), "score")

    def test_engine_ends_when_its_owner_is_killed_during_loading(self, tmp_path: Path) -> None:
        """One that dies while it serves: see the deployment's tests."""
        script = f"""
import asyncio
import psutil
from pathlib import Path
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine

async def own():
    engine = Engine(resolve_checkpoint("tiny"), state_dir=Path({str(tmp_path)!r}), start_s=400)
    starting = asyncio.create_task(engine.start())
    while engine.pid is None or len(psutil.Process(engine.pid).children(recursive=True)) < 3:
        assert not starting.done()
        await asyncio.sleep(0.1)
    print(engine.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(own())
"""
        owner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert owner.stdout is not None
            processes = family(int(owner.stdout.readline()))
            assert len(processes) > 3
            os.kill(owner.pid, signal.SIGKILL)
            assert are_gone(processes, within_s=60), "left behind"
        finally:
            owner.kill()
            owner.wait()
