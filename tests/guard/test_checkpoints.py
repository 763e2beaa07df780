import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from services.errors import ConfigurationError
from services.guard import checkpoints
from services.guard.checkpoints import CHECKPOINTS, resolve, stage

TINY = resolve("tiny").folder
assert TINY is not None


@pytest.fixture
def copy_of_tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "my-guard"))


class TestResolve:
    @pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
    def test_by_name_and_hub_id(self, row) -> None:
        assert resolve(row.name) is row
        assert row.hub_id is None or resolve(row.hub_id) is row

    def test_by_folder(self, copy_of_tiny: Path) -> None:
        found = resolve(str(copy_of_tiny))
        assert (found.name, found.folder) == ("tiny", copy_of_tiny)

    @pytest.mark.parametrize(
        ("hidden_size", "name"), [(896, "LlavaGuard-v1.2-0.5B-OV"), (3584, "LlavaGuard-v1.2-7B-OV")]
    )
    def test_the_config_of_a_folder_decides(self, tmp_path: Path, hidden_size: int, name: str) -> None:
        config = {"architectures": ["LlavaQwenForCausalLM"], "hidden_size": hidden_size}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert resolve(str(tmp_path)).name == name

    @pytest.mark.parametrize("model", ["huge", "AIML-TUDA/Other", "/nowhere"])
    def test_anything_else_lists_what_is_known(self, model: str) -> None:
        with pytest.raises(ConfigurationError, match=r"tiny, LlavaGuard-v1\.2-0\.5B-OV"):
            resolve(model)

    def test_another_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
        with pytest.raises(ConfigurationError, match="BertModel"):
            resolve(str(tmp_path))

    def test_a_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            resolve(str(tmp_path))


class TestStage:
    def test_the_tower_is_named_by_an_absolute_path(self, tmp_path: Path) -> None:
        staged = stage(resolve("tiny"), tmp_path)
        tower = Path(json.loads((staged.folder / "config.json").read_text())["mm_vision_tower"])
        assert tower.is_absolute()
        assert (tower / "config.json").is_file()
        assert "siglip" in tower.name
        assert (staged.folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()

    def test_twice_is_once(self, tmp_path: Path) -> None:
        assert stage(resolve("tiny"), tmp_path) == stage(resolve("tiny"), tmp_path)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1

    def test_other_weights_are_another_revision(self, tmp_path: Path, copy_of_tiny: Path) -> None:
        before = stage(resolve(str(copy_of_tiny)), tmp_path)
        assert before.revision == stage(resolve("tiny"), tmp_path).revision
        weights = copy_of_tiny / "siglip-tiny" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        after = stage(resolve(str(copy_of_tiny)), tmp_path)
        assert after.revision != before.revision
        assert after.folder != before.folder

    def test_several_processes_at_once(self, tmp_path: Path) -> None:
        with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
            staged = {future.result() for future in [pool.submit(stage, resolve("tiny"), tmp_path) for _ in range(8)]}
        assert len(staged) == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [staged.pop().folder.name]

    def test_a_path_that_sglang_would_misread(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"SLUICE_STATE_DIR.*must not contain `clip`"):
            stage(resolve("tiny"), tmp_path / "paperclips")

    def test_a_state_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("a file is in the way")
        with pytest.raises(ConfigurationError, match="cannot be written"):
            stage(resolve("tiny"), tmp_path)

    def test_without_network_or_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*_: object, **__: object) -> str:
            raise LocalEntryNotFoundError("offline")

        monkeypatch.setattr(checkpoints, "snapshot_download", absent)
        with pytest.raises(ConfigurationError, match=r"7B-OV is not in the local cache.*give a local folder"):
            stage(resolve("LlavaGuard-v1.2-7B-OV"), tmp_path)

    def test_a_hub_checkpoint_gets_its_tower_and_overrides(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def snapshot(hub_id: str, **_: object) -> str:
            folder = tmp_path / "cache" / hub_id.replace("/", "--") / "0123abcd"
            folder.mkdir(parents=True)
            tower = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "vocab_size": 152000}
            (folder / "config.json").write_text(json.dumps({} if "siglip" in hub_id else tower))
            return str(folder)

        monkeypatch.setattr(checkpoints, "snapshot_download", snapshot)
        staged = stage(resolve("LlavaGuard-v1.2-7B-OV"), tmp_path / "state")
        config = json.loads((staged.folder / "config.json").read_text())
        assert staged.revision == "0123abcd"
        assert config["vocab_size"] == 152064
        assert Path(config["mm_vision_tower"]).parent == staged.folder
        assert "siglip" in config["mm_vision_tower"]
        assert json.loads((staged.folder / "preprocessor_config.json").read_text())["size"]["height"] == 384
