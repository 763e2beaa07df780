import stat
from importlib.metadata import entry_points
from pathlib import Path

import torch

from services.guard import cpu_platform
from services.guard.checkpoints import resolve
from services.guard.launch import Recipe, write_secrets


def recipe(*, cuda: bool = False) -> Recipe:
    return Recipe(checkpoint=resolve("tiny"), folder=Path("/staged"), cuda=cuda, in_flight=4, deadline_s=60)


def test_the_key_is_in_a_private_file_and_not_in_the_process_list(tmp_path: Path) -> None:
    path = tmp_path / "flags.yaml"
    write_secrets(path, api_key="hush")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "api-key: hush\n"
    assert "--api-key" not in recipe().command(port=1, secrets=path)


def test_it_listens_on_loopback_and_fetches_nothing() -> None:
    argv = recipe().command(port=1234, secrets=Path("/flags"))
    for flag, value in [
        ("--host", "127.0.0.1"),
        ("--port", "1234"),
        ("--allowed-media-domains", "invalid.invalid"),
        ("--sampling-defaults", "openai"),
    ]:
        assert argv[argv.index(flag) + 1] == value


def test_the_device_decides_the_flags() -> None:
    on_cpu, on_gpu = (recipe(cuda=cuda).command(port=1, secrets=Path("/f")) for cuda in (False, True))
    assert "--disable-cuda-graph" in on_cpu
    assert "--disable-cuda-graph" not in on_gpu
    assert "--device" not in on_gpu


def test_the_engine_has_no_credentials_and_no_proxy(tmp_path: Path) -> None:
    inherited = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "3",
        "AWS_SECRET_ACCESS_KEY": "x",
        "SLUICE_REDIS_URL": "redis://:x@host",
        "HF_TOKEN": "x",
        "HTTPS_PROXY": "http://proxy",
        "http_proxy": "http://proxy",
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    env = recipe().environment(inherited, scratch=tmp_path)
    assert set(env) == {
        *("PATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TMPDIR", "REQUEST_TIMEOUT"),
        *("SGLANG_CPU_WORKERS", "OMP_NUM_THREADS"),
    }
    assert env["REQUEST_TIMEOUT"] == "60"


def test_sglang_finds_the_cpu_platform(monkeypatch) -> None:
    (found,) = [entry for entry in entry_points(group="sglang.srt.platforms") if entry.name == "sluice_cpu"]
    assert found.load() is cpu_platform.activate
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_platform.activate() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu_platform.activate() == "services.guard.cpu_platform:CpuPlatform"
