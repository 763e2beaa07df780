"""The checks of the model against a hub on loopback, a full disk and a small memory."""

import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from pydantic_core import to_json

from pipelines.doctor import model_checks
from pipelines.doctor.checks import CheckResult
from pipelines.doctor.model_checks import check_cpu_memory, list_hub_files, run_model_checks
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard.checkpoints import resolve_checkpoint
from services.guard.preflight import GIB
from tests.support.images import make_settings

MODEL = "AIML-TUDA/LlavaGuard-v1.2-0.5B-OV"
SIGLIP = "google/siglip-so400m-patch14-384"


class Hub:
    """A hub: which files a repository has, and for which the login is refused."""

    def __init__(self) -> None:
        self.files = {MODEL: ["config.json", "model.safetensors"], SIGLIP: ["config.json", "model.safetensors"]}
        self.refused: dict[str, tuple[int, str]] = {}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2]).partition("?")[0]
        if name in self.refused:
            status, code = self.refused[name]
            return status, {"X-Error-Code": code}, b"{}"
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        siblings = [{"rfilename": file} for file in self.files[name]]
        return 200, {}, to_json({"id": name, "sha": "0" * 40, "siblings": siblings})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback in place of huggingface.co, and an empty local cache."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return make_settings(**{"model": MODEL, "state_dir": tmp_path / "state"} | changes)


def diagnose(chosen: Settings) -> dict[str, CheckResult]:
    return {result.check: result for result in run_model_checks(chosen)}


@pytest.mark.server
class TestHub:
    def test_model_that_can_be_downloaded_passes(self, hub: Hub, tmp_path: Path) -> None:
        results = diagnose(settings(tmp_path))

        assert all(result.is_ok for result in results.values())
        assert MODEL in results["model"].detail
        assert SIGLIP in results["model"].detail

    @pytest.mark.parametrize("name", [MODEL, SIGLIP])
    def test_gated_repository_is_named(self, name: str, hub: Hub, tmp_path: Path) -> None:
        hub.refused[name] = (403, "GatedRepo")

        with pytest.raises(ConfigurationError, match=f"{name} is gated: accept its terms.*HF_TOKEN"):
            diagnose(settings(tmp_path))

    def test_absent_repository_is_named(self, hub: Hub, tmp_path: Path) -> None:
        del hub.files[MODEL]

        with pytest.raises(ConfigurationError, match=f"{MODEL} does not exist on the hub"):
            diagnose(settings(tmp_path))

    def test_repository_without_safetensors_needs_a_commit(self, hub: Hub, tmp_path: Path) -> None:
        hub.files[SIGLIP] = ["config.json", "pytorch_model.bin"]

        with pytest.raises(ConfigurationError, match=f"{SIGLIP} has no weights in the format safetensors"):
            diagnose(settings(tmp_path))
        assert diagnose(settings(tmp_path, model_revisions=f"{SIGLIP}@{'0' * 40}"))["model"].is_ok

    def test_hub_that_does_not_answer_is_named(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")

        with pytest.raises(ConfigurationError, match=f"{MODEL} cannot be downloaded, because the hub does not answer"):
            diagnose(settings(tmp_path))

    def test_offline_mode_without_a_cache_is_named(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE forbids a download"):
            diagnose(settings(tmp_path))

    def test_cached_repositories_need_no_hub(self, hub: Hub, tmp_path: Path) -> None:
        tiny = resolve_checkpoint("tiny").folder
        assert tiny
        for name in (MODEL, SIGLIP):
            cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
            shutil.copytree(tiny, cached / "snapshots" / ("0" * 40))
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("0" * 40)
        hub.files.clear()

        assert diagnose(settings(tmp_path))["model"].detail == "LlavaGuard-v1.2-0.5B-OV is on this machine"

    def test_full_disk_is_named(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * GIB))

        result = diagnose(settings(tmp_path))["model disk"]

        assert not result.is_ok
        assert "has 4 GiB free, and the model needs 6 GiB: make room, or set HF_HOME" in result.detail


def test_llava_1_5_also_needs_a_tokenizer() -> None:
    files = list_hub_files(resolve_checkpoint("LlavaGuard-v1.1-7B"))

    assert [(each.hub_id, each.has_weights) for each in files] == [
        ("AIML-TUDA/LlavaGuard-v1.1-7B", True),
        ("openai/clip-vit-large-patch14-336", True),
        ("llava-hf/llava-1.5-7b-hf", False),
    ]


def test_folder_with_its_tower_needs_no_hub() -> None:
    assert list_hub_files(resolve_checkpoint("tiny")) == []


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks.os, "access", lambda *_: False)

    result = diagnose(settings(tmp_path, model="tiny"))["model disk"]

    assert not result.is_ok
    assert f"{tmp_path} cannot be written" in result.detail


def test_small_memory_is_named() -> None:
    result = check_cpu_memory(resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV"), 4 * GIB)

    assert not result.is_ok
    assert "on the CPU needs 8 GiB of memory, and there are 4 GiB" in result.detail
    assert check_cpu_memory(resolve_checkpoint("tiny"), 4 * GIB).is_ok
