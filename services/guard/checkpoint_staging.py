"""Prepares a checkpoint as a folder that SGLang can load."""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from services.core.errors import ConfigurationError
from services.guard.checkpoints import Checkpoint
from services.guard.safetensors import read_json, require_weights, strip_prefix

logger = logging.getLogger(__name__)

_COPY_LIMIT_BYTES: Final = 64 << 20
_IGNORED_FILES: Final = ("*.msgpack", "*.h5", "*.gguf", "original/*")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class StagedCheckpoint:
    """Folders that SGLang can load, and the identity of their weights."""

    folder: Path
    revision: str
    """`sha256:` + hex over the files of a local folder, or the commit of a hub repository."""
    tokenizer: Path | None = None
    """The folder of the tokenizer and the image processor, if it is another one."""


def stage(checkpoint: Checkpoint, state_dir: Path) -> StagedCheckpoint:
    """Make a folder that SGLang can load, and download missing files. Blocks. Processes may call it concurrently.

    Raises:
        ConfigurationError: the weights, the vision tower or the tokenizer are not available, or SGLang would misread
            the path `state_dir`.
    """
    if checkpoint.folder is not None:
        source = checkpoint.folder
        require_weights(source)
        revision = _digest(source)
    else:
        source = _download(checkpoint.hub_id or checkpoint.name, weights=True)
        revision = source.name
    documents: dict[str, dict[str, Any]] = {"config.json": read_json(source / "config.json")}
    for name, changes in checkpoint.overrides.items():
        before = documents.get(name) or (read_json(source / name) if (source / name).is_file() else {})
        documents[name] = before | dict(changes)
    if checkpoint.preprocessor is not None:
        documents["preprocessor_config.json"] = dict(checkpoint.preprocessor)
    tower = _find_vision_tower(checkpoint, source, str(documents["config.json"].get("mm_vision_tower") or ""))
    tokenizer = _find_tokenizer(checkpoint, source)
    if tower is None and not checkpoint.overrides and not checkpoint.preprocessor and not checkpoint.tensor_prefix:
        return StagedCheckpoint(source, revision, tokenizer)

    shelf = state_dir.expanduser().resolve() / "checkpoints"
    # The config contains the absolute path of the folder, so the path is part of the identity.
    identity = json.dumps([revision, str(shelf), documents, checkpoint.tensor_prefix], sort_keys=True)
    folder = shelf / f"{checkpoint.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    towers: dict[str, Path] = {}
    if tower is not None:
        staged_tower = folder / _tower_name(checkpoint, tower)
        if "clip" in str(staged_tower) and "clip" not in staged_tower.name:
            raise ConfigurationError(
                f"SLUICE_STATE_DIR={state_dir} must not contain `clip`: SGLang would load the vision tower as CLIP."
            )
        documents["config.json"]["mm_vision_tower"] = str(staged_tower)
        towers[staged_tower.name] = tower
    if not folder.is_dir():
        _fill_folder(checkpoint, source, towers, folder, documents)
    return StagedCheckpoint(folder, revision, tokenizer)


def _find_vision_tower(checkpoint: Checkpoint, source: Path, named: str) -> Path | None:
    """The folder to stage as the vision tower; None if SGLang can load the checkpoint without."""
    if named and not Path(named).is_absolute() and (source / named / "config.json").is_file():
        tower = source / named
    elif Path(named).is_absolute() and Path(named).is_dir():
        return None
    elif checkpoint.vision_tower is not None:
        return _download(checkpoint.vision_tower, weights=True)
    elif named:
        raise ConfigurationError(
            f"{source} names the vision tower {named}, which is not a folder in it: put the tower there."
        )
    else:
        return None
    require_weights(tower)
    return tower


def _tower_name(checkpoint: Checkpoint, tower: Path) -> str:
    """A folder name from which SGLang can tell the kind of the tower: it looks only at the path."""
    if "siglip" in tower.name or "clip" in tower.name:
        return tower.name
    return "clip" if "clip" in (checkpoint.vision_tower or "") else "siglip"


def _find_tokenizer(checkpoint: Checkpoint, source: Path) -> Path | None:
    """The folder of the tokenizer, if it is not in the checkpoint; else None."""
    if checkpoint.tokenizer is None:
        folder = source
    elif (source / "tokenizer").is_dir():
        folder = source / "tokenizer"
    else:
        folder = _download(checkpoint.tokenizer, weights=False)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ConfigurationError(f"{folder} holds no tokenizer ({' or '.join(_TOKENIZERS)}): download it again.")
    return None if folder == source else folder


def _download(hub_id: str, *, weights: bool) -> Path:
    """The snapshot of a hub repository, from the local cache if the hub is unreachable."""
    logger.info("fetching %s from the hub or its local cache", hub_id)
    ignored = [*_IGNORED_FILES, "*.bin"] + ([] if weights else ["*.safetensors"])
    try:
        folder = Path(snapshot_download(hub_id, ignore_patterns=ignored))
        if weights and not any(folder.glob("*.safetensors")):
            # Older repositories, for example CLIP's, have only PyTorch's format.
            folder = Path(snapshot_download(hub_id, ignore_patterns=list(_IGNORED_FILES)))
    except GatedRepoError:
        problem = "is gated: accept its terms on huggingface.co and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "does not exist on the hub, or HF_TOKEN may not read it"
    except LocalEntryNotFoundError:
        problem = "is not in the local cache and the hub cannot be reached: give a local folder as SLUICE_MODEL"
    except (HfHubHTTPError, OSError) as error:
        problem = f"cannot be downloaded ({type(error).__name__})"
    else:
        if weights:
            require_weights(folder)
        return folder
    raise ConfigurationError(f"{hub_id} {problem}.")


def _list_files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _digest(folder: Path) -> str:
    """A digest of all files in the folder that can change an answer."""
    whole = hashlib.sha256()
    for path in _list_files(folder):
        if path.suffix == ".md":
            continue
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _fill_folder(
    checkpoint: Checkpoint,
    source: Path,
    towers: Mapping[str, Path],
    folder: Path,
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    """Fill `folder` atomically: it is written under another name and renamed."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _copy(source, draft)
        if checkpoint.tensor_prefix:
            strip_prefix(draft, checkpoint.tensor_prefix)
        for name, tower in towers.items():
            _copy(tower, draft / name)
        for name, document in documents.items():
            (draft / name).write_text(json.dumps(document, indent=2), encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process has made the folder, with the same content.
    except OSError as error:
        raise ConfigurationError(f"SLUICE_STATE_DIR: {folder} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy files of up to 64 MiB, because an upgrade may replace them, and link larger ones."""
    for path in _list_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            continue
        if path.stat().st_size > _COPY_LIMIT_BYTES:
            os.symlink(path.resolve(), copy)
        else:
            shutil.copyfile(path, copy)
