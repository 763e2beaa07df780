import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard import checkpoint_staging as staging
from services.guard.checkpoint_staging import stage
from services.guard.checkpoints import CHECKPOINTS, order_image, resolve_checkpoint
from services.guard.engine import Engine
from services.guard.gpu_memory import GIB
from services.guard.safetensors import rename_tensors

TINY = resolve_checkpoint("tiny").folder
assert TINY is not None


class Hub:
    """Repositories as `snapshot_download` gives them: a folder whose name is the commit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.configs: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.gated: set[str] = set()
        self.without_safetensors: set[str] = set()

    def __call__(self, hub_id: str, *, revision: str | None = None, ignore_patterns: Sequence[str] = ()) -> str:
        if hub_id in self.gated:
            raise GatedRepoError("gated", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))
        folder = self._folder / hub_id.replace("/", "--") / (revision or "0123abcd")
        folder.mkdir(parents=True, exist_ok=True)
        config = next((config for part, config in self.configs.items() if part in hub_id), {})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        if hub_id in self.without_safetensors:
            if "*.bin" not in ignore_patterns:
                (folder / "pytorch_model.bin").write_bytes(b"")
        elif "*.safetensors" not in ignore_patterns:
            tensors = next((tensors for part, tensors in self.tensors.items() if part in hub_id), {"a": torch.zeros(1)})
            save_file(tensors, folder / "model.safetensors")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake_hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(staging, "snapshot_download", fake_hub)
    return fake_hub


@pytest.fixture
def copy_of_tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "my-guard"))


class TestResolve:
    @pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
    def test_name_or_hub_id_finds_the_row(self, row) -> None:
        assert resolve_checkpoint(row.name) is row
        assert row.hub_id is None or resolve_checkpoint(row.hub_id) is row

    def test_folder_finds_the_row_of_its_config(self, copy_of_tiny: Path) -> None:
        found = resolve_checkpoint(str(copy_of_tiny))
        assert (found.name, found.folder) == ("tiny", copy_of_tiny)

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            ({"architectures": ["LlavaQwenForCausalLM"], "hidden_size": 896}, "LlavaGuard-v1.2-0.5B-OV"),
            ({"architectures": ["LlavaQwenForCausalLM"], "hidden_size": 3584}, "LlavaGuard-v1.2-7B-OV"),
            (
                {"architectures": ["LlavaOnevisionForConditionalGeneration"], "text_config": {"hidden_size": 896}},
                "LlavaGuard-v1.2-0.5B-OV-hf",
            ),
            (
                {"architectures": ["LlavaOnevisionForConditionalGeneration"], "text_config": {"hidden_size": 3584}},
                "LlavaGuard-v1.2-7B-OV-hf",
            ),
            ({"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096}, "LlavaGuard-v1.1-7B"),
            ({"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 5120}, "LlavaGuard-v1.1-13B"),
            (
                {
                    "architectures": ["LlavaLlamaForCausalLM"],
                    "hidden_size": 5120,
                    "_name_or_path": "models/LlavaGuard-v1.0-13b/llava",
                },
                "LlavaGuard-v1.0-13B",
            ),
            ({"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 7168}, "LlavaGuard-34B"),
            ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 2048}, "QwenGuard-v1.2-3B"),
            (
                {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": {"hidden_size": 3584}},
                "QwenGuard-v1.2-7B",
            ),
            (
                {"architectures": ["Qwen2VLForConditionalGeneration"], "hidden_size": 3584},
                "QwenGuard-v1.2-7B",
            ),
            (
                {"architectures": ["ShieldGemma2ForImageClassification"], "text_config": {"hidden_size": 2560}},
                "ShieldGemma-2-4B",
            ),
        ],
    )
    def test_config_of_a_folder_selects_the_row(self, tmp_path: Path, config: dict[str, Any], name: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert resolve_checkpoint(str(tmp_path)).name == name

    def test_folder_name_selects_the_release(self, tmp_path: Path) -> None:
        folder = tmp_path / "llavaguard-v1.0-7b"
        folder.mkdir()
        (folder / "config.json").write_text('{"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096}')
        assert resolve_checkpoint(str(folder)).name == "LlavaGuard-v1.0-7B"

    def test_folder_of_an_unreleased_size_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 64}')
        with pytest.raises(ConfigurationError, match=r"hidden size of 64; .*LlavaLlamaForCausalLM \(4096\)"):
            resolve_checkpoint(str(tmp_path))

    @pytest.mark.parametrize("model", ["huge", "AIML-TUDA/Other", "/nowhere"])
    def test_unknown_model_error_lists_known_checkpoints(self, model: str) -> None:
        with pytest.raises(ConfigurationError, match=r"tiny, LlavaGuard-v1\.2-0\.5B-OV \(AIML-TUDA/.*ShieldGemma-2-4B"):
            resolve_checkpoint(model)

    def test_folder_of_another_architecture_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
        with pytest.raises(ConfigurationError, match="BertModel"):
            resolve_checkpoint(str(tmp_path))

    def test_broken_config_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            resolve_checkpoint(str(tmp_path))


class TestImageOrder:
    @pytest.mark.parametrize("name", ["QwenGuard-v1.2-3B", "LlavaGuard-v1.2-7B-OV", "LlavaGuard-v1.0-7B"])
    def test_image_follows_the_policy_on_request(self, name: str) -> None:
        row = resolve_checkpoint(name)
        image = row.family.image_token[0]
        for order, ahead in (("image_first", True), ("text_first", False), (None, True)):
            example = order_image(row, order).family.build_example()
            assert example.count(image) == 1
            assert (example.index(image) < example.index("Is this image safe?")) == ahead

    def test_order_changes_the_digest_of_the_prompt(self) -> None:
        """Otherwise a stored verdict would be taken for the same judgement."""
        row = resolve_checkpoint("QwenGuard-v1.2-3B")
        assert order_image(row, "text_first").family.adapt_prompt("Be kind.") != row.family.adapt_prompt("Be kind.")
        assert order_image(row, "image_first").family.adapt_prompt("Be kind.") == row.family.adapt_prompt("Be kind.")

    def test_order_of_shieldgemma_is_fixed(self) -> None:
        with pytest.raises(ConfigurationError, match="SLUICE_IMAGE_ORDER cannot be set for ShieldGemma"):
            order_image(resolve_checkpoint("ShieldGemma-2-4B"), "text_first")

    def test_setting_reaches_the_engine(self, tmp_path: Path) -> None:
        settings = Settings(model="QwenGuard-v1.2-3B", image_order="text_first", state_dir=tmp_path)
        family = Engine.from_settings(settings).checkpoint.family
        assert family.build_example().index("safe?") < family.build_example().index("<|image_pad|>")


class TestStage:
    def test_staged_config_names_the_tower_by_an_absolute_path(self, tmp_path: Path) -> None:
        staged = stage(resolve_checkpoint("tiny"), tmp_path)
        tower = Path(json.loads((staged.folder / "config.json").read_text())["mm_vision_tower"])
        assert tower.is_absolute()
        assert (tower / "config.json").is_file()
        assert "siglip" in tower.name
        assert (staged.folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()

    def test_second_stage_reuses_the_folder(self, tmp_path: Path) -> None:
        assert stage(resolve_checkpoint("tiny"), tmp_path) == stage(resolve_checkpoint("tiny"), tmp_path)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1

    def test_changed_weights_change_the_revision(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        before = stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)
        assert before.revision == stage(resolve_checkpoint("tiny"), tmp_path).revision
        weights = copy_of_tiny / "siglip-tiny" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        after = stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)
        assert after.revision != before.revision
        assert after.folder != before.folder

    def test_concurrent_processes_stage_one_folder(self, tmp_path: Path) -> None:
        with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
            staged = {
                future.result()
                for future in [pool.submit(stage, resolve_checkpoint("tiny"), tmp_path) for _ in range(8)]
            }
        assert len(staged) == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [staged.pop().folder.name]

    def test_state_dir_that_sglang_would_misread_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"SLUICE_STATE_DIR.*must not contain `clip`"):
            stage(resolve_checkpoint("tiny"), tmp_path / "paperclips")

    def test_unwritable_state_dir_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("a file is in the way")
        with pytest.raises(ConfigurationError, match="cannot be written"):
            stage(resolve_checkpoint("tiny"), tmp_path)

    def test_hub_checkpoint_without_network_or_cache_is_rejected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(*_: object, **__: object) -> str:
            raise LocalEntryNotFoundError("offline")

        monkeypatch.setattr(staging, "snapshot_download", absent)
        with pytest.raises(ConfigurationError, match=r"7B-OV is not in the local cache.*give a local folder"):
            stage(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), tmp_path)

    def test_hub_checkpoint_is_staged_with_tower_and_overrides(self, tmp_path: Path, hub: Hub) -> None:
        hub.configs = {"LlavaGuard": {"mm_vision_tower": "google/siglip-so400m-patch14-384", "vocab_size": 152000}}
        hub.tensors = {"LlavaGuard": {"model.embed_tokens.weight": torch.zeros(152064, 1)}}
        staged = stage(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), tmp_path / "state")
        config = json.loads((staged.folder / "config.json").read_text())
        assert staged.revision == "0123abcd"
        assert config["vocab_size"] == 152064
        assert Path(config["mm_vision_tower"]).parent == staged.folder
        assert "siglip" in config["mm_vision_tower"]
        assert json.loads((staged.folder / "preprocessor_config.json").read_text())["size"]["height"] == 384
        assert staged.tokenizer is None

    @pytest.mark.parametrize(
        ("name", "tower", "image_token_index"),
        [
            ("LlavaGuard-v1.2-0.5B-OV", "google/siglip-so400m-patch14-384", 151646),
            ("LlavaGuard-v1.2-7B-OV", "google/siglip-so400m-patch14-384", 151646),
            ("LlavaGuard-v1.1-7B", "openai/clip-vit-large-patch14-336", 32000),
            ("LlavaGuard-34B", "openai/clip-vit-large-patch14-336", 64002),
        ],
    )
    def test_config_of_llavas_own_trainer_is_corrected(
        self, tmp_path: Path, hub: Hub, name: str, tower: str, image_token_index: int
    ) -> None:
        """It names no image token, a type that transformers does not know, and a vocabulary without added tokens."""
        hub.configs = {"LlavaGuard": {"mm_vision_tower": tower, "model_type": "llava_qwen", "vocab_size": 10}}
        hub.tensors = {"LlavaGuard": {"model.embed_tokens.weight": torch.zeros(12, 1)}}
        staged = stage(resolve_checkpoint(name), tmp_path / "state")
        config = json.loads((staged.folder / "config.json").read_text())
        assert config["model_type"] == "llava"
        assert config["vocab_size"] == 12
        assert config["image_token_index"] == image_token_index

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("tokenizer.json", {"added_tokens": [{"id": 5, "content": "<x>"}, {"id": 7, "content": "<image>"}]}),
            ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<image>"}}}),
            ("added_tokens.json", {"<image>": 7}),
        ],
    )
    def test_image_token_of_the_tokenizer_is_written_into_the_config(
        self, tmp_path: Path, copy_of_tiny: Path, file: str, content: dict[str, Any]
    ) -> None:
        (copy_of_tiny / "tokenizer.json").write_text("{}")
        (copy_of_tiny / file).write_text(json.dumps(content))
        staged = stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path / "state")
        assert json.loads((staged.folder / "config.json").read_text())["image_token_index"] == 7

    def test_config_with_an_absolute_tower_is_corrected(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        config = json.loads((copy_of_tiny / "config.json").read_text())
        config |= {"mm_vision_tower": str(TINY / "siglip-tiny"), "model_type": "llava_qwen"}
        (copy_of_tiny / "config.json").write_text(json.dumps(config))
        staged = stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path / "state")
        assert json.loads((staged.folder / "config.json").read_text())["model_type"] == "llava"

    def test_image_token_of_an_unknown_tokenizer_is_that_of_the_config(
        self, tmp_path: Path, copy_of_tiny: Path
    ) -> None:
        (copy_of_tiny / "tokenizer.json").write_text("{}")
        staged = stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path / "state")
        assert json.loads((staged.folder / "config.json").read_text())["image_token_index"] == 1355

    def test_pinned_commit_is_downloaded_and_a_new_one_is_not(
        self, tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever takes over a repository of the hub changes its newest commit."""
        hub.configs = {"LlavaGuard": {"mm_vision_tower": "google/siglip-so400m-patch14-384"}}
        pinned = {"AIML-TUDA/LlavaGuard-v1.2-7B-OV": "a" * 40, "google/siglip-so400m-patch14-384": "b" * 40}
        staged = stage(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), tmp_path / "state", pinned)

        assert staged.revision == "a" * 40
        assert sorted(path.name for path in (tmp_path / "hub").glob("*/*")) == ["a" * 40, "b" * 40]
        assert "the hub chose" not in caplog.text
        stage(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), tmp_path / "state")
        assert "add AIML-TUDA/LlavaGuard-v1.2-7B-OV@0123abcd to SLUICE_MODEL_REVISIONS" in caplog.text

    def test_older_release_is_staged_with_tower_and_tokenizer(self, tmp_path: Path, hub: Hub) -> None:
        hub.configs = {"LlavaGuard": {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}}
        hub.without_safetensors = {"openai/clip-vit-large-patch14-336"}
        with pytest.raises(
            ConfigurationError, match=r"other formats are pickles: .*clip-vit-large-patch14-336@0123abcd"
        ):
            stage(resolve_checkpoint("LlavaGuard-v1.1-7B"), tmp_path / "state")
        trusted = {"openai/clip-vit-large-patch14-336": "f" * 40}
        staged = stage(resolve_checkpoint("LlavaGuard-v1.1-7B"), tmp_path / "state", trusted)
        assert Path(json.loads((staged.folder / "config.json").read_text())["mm_vision_tower"]).name == "clip"
        assert (staged.folder / "clip" / "pytorch_model.bin").is_file()
        assert staged.tokenizer is not None
        assert staged.tokenizer.parent.name == "llava-hf--llava-1.5-7b-hf"
        assert not (staged.tokenizer / "model.safetensors").exists()

    def test_tokenizer_in_the_local_folder_is_used(self, tmp_path: Path, hub: Hub) -> None:
        hub.configs = {"LlavaGuard": {"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096}}
        folder = Path(hub("AIML-TUDA/LlavaGuard-v1.0-7B"))
        (folder / "tokenizer").mkdir()
        with pytest.raises(ConfigurationError, match="holds no tokenizer"):
            stage(resolve_checkpoint(str(folder)), tmp_path / "state")
        (folder / "tokenizer" / "tokenizer.model").write_text("")
        assert stage(resolve_checkpoint(str(folder)), tmp_path / "state").tokenizer == folder / "tokenizer"

    def test_gated_checkpoint_is_rejected(self, tmp_path: Path, hub: Hub) -> None:
        hub.gated = {"AIML-TUDA/QwenGuard-v1.2-3B"}
        with pytest.raises(ConfigurationError, match=r"QwenGuard-v1\.2-3B is gated: accept its terms .* set HF_TOKEN"):
            stage(resolve_checkpoint("QwenGuard-v1.2-3B"), tmp_path)

    def test_missing_tokenizer_is_rejected(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        (copy_of_tiny / "tokenizer.json").unlink()
        with pytest.raises(ConfigurationError, match="holds no tokenizer"):
            stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)

    def test_missing_vision_tower_is_rejected(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        shutil.rmtree(copy_of_tiny / "siglip-tiny")
        with pytest.raises(ConfigurationError, match="names the vision tower siglip-tiny, which is not a folder in it"):
            stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)


class TestWeights:
    def test_folder_without_weights_is_rejected(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        (copy_of_tiny / "siglip-tiny" / "model.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=r"siglip-tiny holds no weights"):
            stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)

    def test_missing_shard_is_rejected(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (copy_of_tiny / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigurationError, match=r"lacks model-2\.safetensors \(1 of 2 files"):
            stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)

    @pytest.mark.parametrize(
        "damage", [lambda data: data[:-1], lambda _: b"version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_damaged_file_or_lfs_pointer_is_rejected(self, tmp_path: Path, copy_of_tiny: Path, damage) -> None:
        weights = copy_of_tiny / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        with pytest.raises(ConfigurationError, match="is damaged, or only a Git LFS pointer"):
            stage(resolve_checkpoint(str(copy_of_tiny)), tmp_path)

    def test_renaming_leaves_the_original_unchanged(self, tmp_path: Path) -> None:
        tensors = {"model.a": torch.arange(5), "model.model.b": torch.ones(3), "c": torch.zeros(2)}
        save_file(tensors, tmp_path / "original.bin")
        folder = tmp_path / "staged"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(tmp_path / "original.bin")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.a": "model.safetensors"}}')
        before = (tmp_path / "original.bin").read_bytes()
        rename_tensors(folder, lambda name: name.removeprefix("model."))
        renamed = load_file(folder / "model.safetensors")
        assert set(renamed) == {"a", "model.b", "c"}
        assert torch.equal(renamed["a"], torch.arange(5))
        assert (tmp_path / "original.bin").read_bytes() == before
        assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] == {
            "a": "model.safetensors"
        }


class TestSpread:
    @pytest.mark.parametrize(
        ("name", "cards", "gpus"),
        [
            ("LlavaGuard-v1.2-7B-OV", [24], 0),
            ("LlavaGuard-v1.2-7B-OV", [22.5, 22.5], 2),
            ("LlavaGuard-v1.2-7B-OV", [39.6], 1),
            ("LlavaGuard-v1.1-7B", [22.5], 1),
            ("LlavaGuard-v1.1-13B", [22.5], 0),
            ("LlavaGuard-v1.1-13B", [79.3], 1),
            ("LlavaGuard-34B", [79.3], 0),
            ("LlavaGuard-34B", [79.3, 79.3], 2),
            ("LlavaGuard-34B", [79.3, 22.5, 79.3], 0),
            ("LlavaGuard-34B", [139.8], 1),
            ("QwenGuard-v1.2-7B", [22.5], 1),
            ("tiny", [], 0),
        ],
    )
    def test_checkpoint_is_spread_over_as_few_gpus_as_hold_it(self, name: str, cards: list[float], gpus: int) -> None:
        assert resolve_checkpoint(name).tensor_parallel_size([int(card * GIB) for card in cards]) == gpus
