"""The checkpoints that Sluice knows, and how each becomes a folder that SGLang can load.

A new release is a new row of `CHECKPOINTS`.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from services.errors import ConfigurationError

logger = logging.getLogger(__name__)

Layout = Literal["chatml-llava"]
"""How a checkpoint was taught to be asked; `services.guard.answer.question` writes it."""

GIB: Final = 1 << 30
_COPY_LIMIT_BYTES: Final = 64 << 20
_SIGLIP: Final = "google/siglip-so400m-patch14-384"
_SIGLIP_PREPROCESSOR: Final = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 384, "width": 384},
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One row: what is known about a set of weights without loading it."""

    name: str
    hub_id: str | None
    architecture: str
    layout: Layout
    max_side_px: int
    """Longest side of an image, in pixels, beyond which this model sees nothing more."""
    gpu_memory_bytes: int
    """What one replica wants: weights, KV cache and working space."""
    hidden_size: int | None = None
    """Tells rows of one architecture apart when a local folder is named; None: the row for any other size."""
    vision_tower: str | None = None
    """Hub id of the vision tower, when the checkpoint does not bring one along."""
    tokenizer: str | None = None
    """Hub id of the tokenizer, when the checkpoint does not bring one along."""
    launch_flags: tuple[str, ...] = ("--dtype", "float16")
    """float16, since SGLang always loads a LLaVA vision tower so."""
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] | None = None
    """Written as preprocessor_config.json over the checkpoint's own."""
    folder: Path | None = None
    """Where the weights are, for one that is on this machine already."""


@dataclass(frozen=True, slots=True)
class StagedCheckpoint:
    """A folder that SGLang can load, and what identifies its weights."""

    folder: Path
    revision: str
    """`sha256:` + hex over the files of a local folder, or the commit of a hub repository."""


CHECKPOINTS: Final = (
    Checkpoint(
        name="tiny",
        hub_id=None,
        architecture="LlavaQwenForCausalLM",
        layout="chatml-llava",
        # Its tower sees 64 px, but it was trained on the engine's own scaling of images up to this size.
        max_side_px=384,
        gpu_memory_bytes=2 * GIB,
        folder=Path(__file__).parent / "tiny",
    ),
    Checkpoint(
        name="LlavaGuard-v1.2-0.5B-OV",
        hub_id="AIML-TUDA/LlavaGuard-v1.2-0.5B-OV",
        architecture="LlavaQwenForCausalLM",
        layout="chatml-llava",
        # The largest side of its anyres grid: 6 tiles of 384 px.
        max_side_px=2304,
        gpu_memory_bytes=12 * GIB,
        hidden_size=896,
        vision_tower=_SIGLIP,
        preprocessor=_SIGLIP_PREPROCESSOR,
    ),
    Checkpoint(
        name="LlavaGuard-v1.2-7B-OV",
        hub_id="AIML-TUDA/LlavaGuard-v1.2-7B-OV",
        architecture="LlavaQwenForCausalLM",
        layout="chatml-llava",
        max_side_px=2304,
        gpu_memory_bytes=40 * GIB,
        hidden_size=3584,
        vision_tower=_SIGLIP,
        preprocessor=_SIGLIP_PREPROCESSOR,
        # Its embedding table has this many rows; a config that says less fails while loading.
        config_overrides={"vocab_size": 152064},
    ),
)


def resolve(model: str) -> Checkpoint:
    """The checkpoint that a setting means: a name of the table, a hub id of it, or a local folder.

    Raises:
        ConfigurationError: it is none of these.
    """
    for row in CHECKPOINTS:
        if model in (row.name, row.hub_id):
            return row
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _row_for(folder.resolve())
    known = ", ".join([*(row.name for row in CHECKPOINTS), *(row.hub_id for row in CHECKPOINTS if row.hub_id)])
    raise ConfigurationError(
        f"SLUICE_MODEL={model} is neither a folder with a config.json nor a checkpoint that Sluice knows: {known}."
    )


def stage(checkpoint: Checkpoint, state_dir: Path) -> StagedCheckpoint:
    """Make a folder that SGLang can load, downloading what is missing. Blocks; safe in several processes at once.

    Raises:
        ConfigurationError: the weights cannot be had, or `state_dir` is a path that SGLang would misread.
    """
    if checkpoint.folder is not None:
        source, revision = checkpoint.folder, _digest(checkpoint.folder)
    else:
        source = _download(checkpoint.hub_id or checkpoint.name)
        revision = source.name
    config = _read_config(source) | dict(checkpoint.config_overrides)
    tower = _vision_tower(checkpoint, source, str(config.get("mm_vision_tower", "")))
    if tower is None:
        return StagedCheckpoint(source, revision)

    shelf = state_dir.expanduser().resolve() / "checkpoints"
    # The folder holds its own absolute path, so that is part of what its name stands for.
    identity = json.dumps([revision, str(shelf), config, dict(checkpoint.preprocessor or {})], sort_keys=True)
    folder = shelf / f"{checkpoint.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    staged_tower = folder / (tower.name if "siglip" in tower.name else "siglip")
    if "clip" in str(staged_tower):
        raise ConfigurationError(
            f"SLUICE_STATE_DIR={state_dir} must not contain `clip`: SGLang would load the vision tower as CLIP."
        )
    if not folder.is_dir():
        files: dict[str, str] = {
            "config.json": json.dumps(config | {"mm_vision_tower": str(staged_tower)}, indent=2),
        }
        if checkpoint.preprocessor is not None:
            files["preprocessor_config.json"] = json.dumps(dict(checkpoint.preprocessor), indent=2)
        _place(source, tower, folder, staged_tower.name, files)
    return StagedCheckpoint(folder, revision)


def _row_for(folder: Path) -> Checkpoint:
    config = _read_config(folder)
    architectures = config.get("architectures") or ["none"]
    rows = [row for row in CHECKPOINTS if row.architecture == architectures[0]]
    exact = [row for row in rows if row.hidden_size == config.get("hidden_size")]
    for row in exact or [row for row in rows if row.hidden_size is None]:
        return replace(row, folder=folder)
    known = ", ".join(sorted({row.architecture for row in CHECKPOINTS}))
    raise ConfigurationError(
        f"{folder} holds a model of the architecture {architectures[0]}; Sluice knows how to ask these: {known}."
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{folder / 'config.json'} is not a JSON object.")
    return config


def _vision_tower(checkpoint: Checkpoint, source: Path, named: str) -> Path | None:
    """The folder to stage as the vision tower, or None when SGLang can load the checkpoint as it is."""
    if named and not Path(named).is_absolute() and (source / named / "config.json").is_file():
        return source / named
    if Path(named).is_absolute() and Path(named).is_dir():
        return None
    if checkpoint.vision_tower is not None:
        return _download(checkpoint.vision_tower)
    if named:
        raise ConfigurationError(f"{source} names the vision tower {named}, which is not a folder in it.")
    return None


def _download(hub_id: str) -> Path:
    """The snapshot of a hub repository, from the local cache when the hub cannot be reached."""
    logger.info("fetching %s from the hub or its local cache", hub_id)
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=["*.bin", "*.msgpack", "*.h5", "*.gguf"]))
    except GatedRepoError:
        problem = "is gated: accept its terms on huggingface.co and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "does not exist on the hub, or HF_TOKEN may not read it"
    except LocalEntryNotFoundError:
        problem = "is not in the local cache and the hub cannot be reached: give a local folder as SLUICE_MODEL"
    except (HfHubHTTPError, OSError) as error:
        problem = f"cannot be downloaded ({type(error).__name__})"
    raise ConfigurationError(f"{hub_id} {problem}.")


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _digest(folder: Path) -> str:
    """Over the content of everything in the folder that can change an answer."""
    whole = hashlib.sha256()
    for path in _files(folder):
        if path.suffix == ".md":
            continue
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _place(source: Path, tower: Path, folder: Path, tower_name: str, files: Mapping[str, str]) -> None:
    """Fill `folder`, which appears complete or not at all: it is written under another name and renamed."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _copy(source, draft)
        _copy(tower, draft / tower_name)
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was faster: its folder has the same content.
    except OSError as error:
        raise ConfigurationError(f"SLUICE_STATE_DIR: {folder} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Small files are copied, since an upgrade may replace them; large ones are linked."""
    for path in _files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            continue
        if path.stat().st_size > _COPY_LIMIT_BYTES:
            os.symlink(path.resolve(), copy)
        else:
            shutil.copyfile(path, copy)
