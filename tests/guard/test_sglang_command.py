import argparse
import itertools
import json
import os
import stat
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from sglang.srt.server_args import ServerArgs

from services.core.processes import SupervisedProcess
from services.guard import sglang_cpu as cpu_platform
from services.guard.checkpoints import CHECKPOINTS, resolve_checkpoint
from services.guard.gpu_memory import MemoryPlan
from services.guard.sglang_command import LaunchConfig, write_secrets


def launch_config(model: str = "tiny", *, gpus: int = 0, tokenizer: Path | None = None) -> LaunchConfig:
    return LaunchConfig(
        checkpoint=resolve_checkpoint(model),
        folder=Path("/staged"),
        plan=MemoryPlan(gpus=gpus, in_flight=4, prefill_tokens=16384, kv_tokens=80_000) if gpus else None,
        in_flight=4,
        deadline_s=60,
        tokenizer=tokenizer,
    )


def test_key_is_in_a_private_file_and_not_in_the_process_list(tmp_path: Path) -> None:
    path = tmp_path / "flags.yaml"
    write_secrets(path, api_key="hush")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "api-key: hush\n"
    assert "--api-key" not in launch_config().command(port=1, secrets=path)


def test_server_listens_on_loopback_and_fetches_nothing() -> None:
    argv = launch_config().command(port=1234, secrets=Path("/flags"))
    for flag, value in [
        ("--host", "127.0.0.1"),
        ("--port", "1234"),
        ("--allowed-media-domains", "invalid.invalid"),
        ("--sampling-defaults", "openai"),
    ]:
        assert argv[argv.index(flag) + 1] == value


def test_device_selects_the_flags() -> None:
    on_cpu, on_gpu = (launch_config(gpus=gpus).command(port=1, secrets=Path("/f")) for gpus in (0, 2))
    assert "--disable-cuda-graph" in on_cpu
    assert "--disable-cuda-graph" not in on_gpu
    assert "--device" not in on_gpu
    assert on_gpu[on_gpu.index("--tp-size") + 1] == "2"
    assert "--tp-size" not in on_cpu


def test_flags_of_the_operator_come_last() -> None:
    config = replace(launch_config("ShieldGemma-2-4B", gpus=1), engine_flags=("--attention-backend", "fa3"))
    assert config.command(port=1, secrets=Path("/f"))[-2:] == ["--attention-backend", "fa3"]


def test_plan_of_the_memory_is_passed() -> None:
    argv = launch_config(gpus=1).command(port=1, secrets=Path("/f"))
    passed = dict(itertools.pairwise(argv))
    assert passed["--max-total-tokens"] == "80000"
    assert passed["--chunked-prefill-size"] == passed["--max-prefill-tokens"] == "16384"
    assert passed["--cuda-graph-max-bs-decode"] == "4"
    assert int(passed["--max-running-requests"]) > 4
    assert float(passed["--mem-fraction-static"]) <= 0.9


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_sglang_knows_every_flag(gpus: int) -> None:
    """For each checkpoint, by SGLang's own parser, which rejects what it does not know."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for row in CHECKPOINTS:
        argv = launch_config(row.name, gpus=gpus, tokenizer=Path("/tokenizer")).command(port=1, secrets=Path("/f"))
        flags = argv[argv.index("sglang.launch_server") + 1 :]
        at = flags.index("--config")
        parsed = parser.parse_args(flags[:at] + flags[at + 2 :])
        assert parsed.host == "127.0.0.1"
        assert parsed.tp_size == (gpus or 1)


def test_flags_of_the_checkpoint_are_passed() -> None:
    on_cpu, on_gpu = (
        launch_config("ShieldGemma-2-4B", gpus=gpus).command(port=1, secrets=Path("/f")) for gpus in (0, 1)
    )
    assert "--enable-multimodal" in on_cpu
    assert on_cpu[on_cpu.index("--attention-backend") + 1] == "torch_native"
    assert on_gpu[on_gpu.index("--attention-backend") + 1] == "triton"


def test_qwenguard_sees_no_more_pixels_than_its_evaluation() -> None:
    argv = launch_config("QwenGuard-v1.2-7B", gpus=1).command(port=1, secrets=Path("/f"))
    limit = json.loads(argv[argv.index("--mm-process-config") + 1])["image"]["max_pixels"]
    assert limit == 1_003_520
    assert limit // (28 * 28) == resolve_checkpoint("QwenGuard-v1.2-7B").size.image_tokens
    assert "--mm-process-config" not in launch_config("tiny").command(port=1, secrets=Path("/f"))


def test_tokenizer_path_is_passed() -> None:
    assert "--tokenizer-path" not in launch_config().command(port=1, secrets=Path("/f"))
    argv = launch_config("LlavaGuard-v1.0-7B", tokenizer=Path("/tokenizer")).command(port=1, secrets=Path("/f"))
    assert argv[argv.index("--tokenizer-path") + 1] == "/tokenizer"


ATTACKED = {
    "AWS_SECRET_ACCESS_KEY": "hush",
    "SLUICE_REDIS_URL": "redis://:hush@host",
    "HF_TOKEN": "hush",
    "HUGGING_FACE_HUB_TOKEN": "hush",
    "RAY_AUTH_TOKEN": "hush",
    "RAY_AUTH_MODE": "token",
    "RAY_REDIS_PASSWORD": "hush",
    "REDIS_PASSWORD": "hush",
    "NVIDIA_API_KEY": "hush",
    "NGC_API_KEY": "hush",
    "CUDA_MIRROR_TOKEN": "hush",
    "TORCH_HUB_PASSWORD": "hush",
    "GITHUB_TOKEN": "hush",
    "DATABASE_URL": "postgres://user:hush@host",
    "A_NAME_OF_TOMORROW": "hush",
    "HTTPS_PROXY": "http://user:hush@proxy",
    "http_proxy": "http://user:hush@proxy",
    "SGLANG_USE_CPU_ENGINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
NEEDED = {
    "SGLANG_CACHE_DIR": "/cache",
    "PATH": "/bin",
    "HOME": "/home/user",
    "CUDA_VISIBLE_DEVICES": "3",
    "LC_ALL": "C.UTF-8",
    "NCCL_DEBUG": "WARN",
}


def test_environment_has_only_what_computing_needs(tmp_path: Path) -> None:
    env = launch_config().environment(ATTACKED | NEEDED, port=1234, scratch=tmp_path)
    assert env.items() >= NEEDED.items()
    assert set(env) - set(NEEDED) == {
        *("PYTHONSAFEPATH", "HF_HUB_OFFLINE", "TMPDIR", "REQUEST_TIMEOUT", "SGLANG_CPU_WORKERS", "OMP_NUM_THREADS"),
        *("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "MASTER_ADDR", "MASTER_PORT"),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    }
    assert env["REQUEST_TIMEOUT"] == "60"


def test_ranks_of_the_engine_stay_on_loopback(tmp_path: Path) -> None:
    inherited = {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "10.0.0.1"}
    first, second = (
        launch_config(gpus=2).environment(inherited, port=port, scratch=tmp_path / str(port)) for port in (1, 2)
    )
    assert first["NCCL_SOCKET_IFNAME"] == first["GLOO_SOCKET_IFNAME"] == "lo"
    assert first["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"file://{tmp_path}/1/ranks"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] != second["MASTER_PORT"], "engines on one machine must not share memory"


def test_started_process_reads_no_credential_in_its_environment(tmp_path: Path) -> None:
    """The kernel's view of the child, as code inside a taken engine would read it."""
    own = {"PATH": os.environ["PATH"]}
    env = launch_config().environment(ATTACKED | own, port=1234, scratch=tmp_path)
    child = SupervisedProcess(
        [sys.executable, "-c", "print(open('/proc/self/environ').read().replace(chr(0), chr(10)))"],
        log=tmp_path / "log",
        env=env,
    )
    try:
        deadline = time.monotonic() + 30
        while child.returncode is None and time.monotonic() < deadline:
            time.sleep(0.05)
        written = (tmp_path / "log").read_text()
    finally:
        child.kill()
    assert f"PATH={own['PATH']}" in written
    assert "hush" not in written


def test_entry_point_of_the_cpu_platform_is_installed(monkeypatch) -> None:
    (found,) = [entry for entry in entry_points(group="sglang.srt.platforms") if entry.name == "sluice_cpu"]
    assert found.load() is cpu_platform.activate
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_platform.activate() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu_platform.activate() == "services.guard.sglang_cpu:CpuPlatform"
