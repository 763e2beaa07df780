"""The checks of the model against a hub on loopback, a full disk and a small memory."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from pipelines.doctor import model_checks
from pipelines.doctor.checks import CheckResult
from pipelines.doctor.model_checks import check_cpu_memory, list_hub_files, run_model_checks
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard.checkpoints import resolve_checkpoint
from services.guard.gpu_memory import GIB
from tests.support.images import make_settings
from tests.support.model_hub import MODEL, SIGLIP, Hub


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return make_settings(**{"model": MODEL, "state_dir": tmp_path / "state"} | changes)


def diagnose(chosen: Settings) -> dict[str, CheckResult]:
    return {result.check: result for result in run_model_checks(chosen)}


@pytest.mark.server
class TestHub:
    def test_model_that_can_be_downloaded_passes(self, model_hub: Hub, tmp_path: Path) -> None:
        results = diagnose(settings(tmp_path))

        assert all(result.is_ok for result in results.values())
        assert MODEL in results["model"].detail
        assert SIGLIP in results["model"].detail
        assert "5.0 GiB to download" in results["model disk"].detail

    def test_files_that_staging_leaves_out_do_not_count_for_the_disk(self, model_hub: Hub, tmp_path: Path) -> None:
        model_hub.files[MODEL] |= {"pytorch_model.bin": 40 * GIB, "original/weights.safetensors": 40 * GIB}

        assert "5.0 GiB to download" in diagnose(settings(tmp_path))["model disk"].detail

    @pytest.mark.parametrize("name", [MODEL, SIGLIP])
    def test_gated_repository_is_named(self, name: str, model_hub: Hub, tmp_path: Path) -> None:
        model_hub.refused[name] = (403, "GatedRepo")

        with pytest.raises(ConfigurationError, match=f"{name} is gated: accept its terms.*HF_TOKEN"):
            diagnose(settings(tmp_path))

    def test_absent_repository_is_named(self, model_hub: Hub, tmp_path: Path) -> None:
        del model_hub.files[MODEL]

        with pytest.raises(ConfigurationError, match=f"{MODEL} does not exist on the hub"):
            diagnose(settings(tmp_path))

    def test_repository_without_safetensors_needs_a_commit(self, model_hub: Hub, tmp_path: Path) -> None:
        model_hub.files[SIGLIP] = {"config.json": 1, "pytorch_model.bin": 3 * GIB}

        with pytest.raises(ConfigurationError, match=f"{SIGLIP} has no weights in the format safetensors"):
            diagnose(settings(tmp_path))
        results = diagnose(settings(tmp_path, model_revisions=f"{SIGLIP}@{'0' * 40}"))
        assert results["model"].is_ok
        assert "5.0 GiB to download" in results["model disk"].detail

    def test_hub_that_does_not_answer_is_named(
        self, model_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")

        with pytest.raises(ConfigurationError, match=f"{MODEL} cannot be downloaded, because the hub does not answer"):
            diagnose(settings(tmp_path))

    def test_offline_mode_without_a_cache_is_named(
        self, model_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE forbids a download"):
            diagnose(settings(tmp_path))

    def test_cached_repositories_need_no_hub(self, model_hub: Hub, tmp_path: Path) -> None:
        tiny = resolve_checkpoint("tiny").folder
        assert tiny
        for name in (MODEL, SIGLIP):
            cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
            shutil.copytree(tiny, cached / "snapshots" / ("0" * 40))
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("0" * 40)
        model_hub.files.clear()

        assert diagnose(settings(tmp_path))["model"].detail == "LlavaGuard-v1.2-0.5B-OV is on this machine"

    def test_full_disk_is_named(self, model_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * GIB))

        result = diagnose(settings(tmp_path))["model disk"]

        assert not result.is_ok
        assert "has 4.0 GiB free, and the model needs 5.0 GiB: make room, or set HF_HOME" in result.detail

    def test_disk_of_downloads_and_staged_checkpoints_must_hold_both(
        self, model_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        converted = f"{MODEL}-hf"
        model_hub.files[converted] = {"config.json": 1, "model.safetensors": 2 * GIB}
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
        chosen = settings(tmp_path, model=converted)

        result = diagnose(chosen)["model disk"]

        assert not result.is_ok
        assert "the model needs 3.9 GiB" in result.detail
        (chosen.state_dir / "checkpoints" / "LlavaGuard-v1.2-0.5B-OV-hf-0123").mkdir(parents=True)
        assert diagnose(chosen)["model disk"].is_ok  # its tensors have been renamed already


def test_llava_1_5_also_needs_a_tokenizer() -> None:
    files = list_hub_files(resolve_checkpoint("LlavaGuard-v1.1-7B"))

    assert [(each.hub_id, each.has_weights) for each in files] == [
        ("AIML-TUDA/LlavaGuard-v1.1-7B", True),
        ("openai/clip-vit-large-patch14-336", True),
        ("llava-hf/llava-1.5-7b-hf", False),
    ]


def test_model_of_guards_on_another_cluster_is_not_looked_for_here(tmp_path: Path) -> None:
    results = diagnose(settings(tmp_path, model="/a/folder/of/the/nodes", ray_address="head:6379"))

    assert all(result.is_ok and "head:6379" in result.detail for result in results.values())
    assert list(results) == ["model", "model disk"]


def test_tiny_needs_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB // 2))

    assert diagnose(settings(tmp_path, model="tiny"))["model disk"].is_ok


def test_image_order_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_IMAGE_ORDER cannot be set for ShieldGemma"):
        diagnose(settings(tmp_path, model="google/shieldgemma-2-4b-it", image_order="text_first"))


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
