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
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.core.errors import ConfigurationError
from services.guard.checkpoints import Checkpoint
from services.guard.safetensors import (
    extract_tensors,
    find_shape,
    has_tensor,
    read_json,
    rename_tensors,
    require_weights,
)

logger = logging.getLogger(__name__)

_COPY_LIMIT_BYTES: Final = 64 << 20
_IGNORED_FILES: Final = ("*.msgpack", "*.h5", "*.gguf", "original/*")
_EMBEDDINGS: Final = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)
CONVERTED_TOWER: Final = "siglip"
"""The folder of the vision tower in a staged checkpoint of transformers' layout."""
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class StagedCheckpoint:
    """Folders that SGLang can load, and the identity of their weights."""

    folder: Path
    revision: str
    """`sha256:` + hex over the files of a local folder, or the commit of a hub repository."""
    tokenizer: Path | None = None
    """The folder of the tokenizer and the image processor, if it is another one."""


def stage(checkpoint: Checkpoint, state_dir: Path, revisions: Mapping[str, str] | None = None) -> StagedCheckpoint:
    """Make a folder that SGLang can load, and download missing files. Blocks. Processes may call it concurrently.

    `revisions` are the commits of hub repositories, by hub id. The newest commit is taken of any other repository.

    Raises:
        ConfigurationError: the weights, the vision tower or the tokenizer are not available, or SGLang would misread
            the path `state_dir`.
    """
    revisions = revisions or {}
    if checkpoint.folder is not None:
        source = checkpoint.folder
        require_weights(source)
        revision = _digest(source)
    else:
        source = _download(checkpoint.hub_id or checkpoint.name, revisions, weights=True)
        revision = source.name
    config = read_json(source / "config.json")
    documents: dict[str, dict[str, Any]] = {"config.json": dict(config)}
    for name, changes in checkpoint.overrides.items():
        before = documents.get(name) or (read_json(source / name) if (source / name).is_file() else {})
        documents[name] = before | dict(changes)
    if checkpoint.preprocessor is not None:
        documents["preprocessor_config.json"] = dict(checkpoint.preprocessor)
    named_tower = str(documents["config.json"].get("mm_vision_tower") or "")
    tower = _find_vision_tower(checkpoint, source, named_tower, revisions)
    tokenizer = _find_tokenizer(checkpoint, source, revisions)
    if checkpoint.is_converted:
        documents |= _convert(source, documents)
    if checkpoint.is_llava:
        documents["config.json"] |= _correct_llava(checkpoint, source, tokenizer or source)
    if tower is None and documents == {"config.json": config} and not checkpoint.tensor_prefix:
        return StagedCheckpoint(source, revision, tokenizer)

    shelf = state_dir.expanduser().resolve() / "checkpoints"
    # The config contains the absolute path of the folder, so the path is part of the identity.
    identity = json.dumps([revision, str(shelf), documents, checkpoint.tensor_prefix], sort_keys=True)
    folder = shelf / f"{checkpoint.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    towers: dict[str, Path] = {}
    if checkpoint.is_converted:
        documents["config.json"]["mm_vision_tower"] = str(folder / CONVERTED_TOWER)
    if tower is not None:
        staged_tower = folder / _tower_name(checkpoint, tower)
        documents["config.json"]["mm_vision_tower"] = str(staged_tower)
        towers[staged_tower.name] = tower
    tower_path = str(documents["config.json"].get("mm_vision_tower") or "")
    if tower_path and "clip" in tower_path and "clip" not in Path(tower_path).name:
        raise ConfigurationError(
            f"SLUICE_STATE_DIR={state_dir} must not contain `clip`: SGLang would load the vision tower as CLIP."
        )
    if not folder.is_dir():
        _fill_folder(checkpoint, source, towers, folder, documents)
    return StagedCheckpoint(folder, revision, tokenizer)


def _convert(source: Path, documents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint in transformers' layout, as SGLang's LLaVA reads them."""
    # transformers is heavy, and only these checkpoints need it.
    from services.guard.onevision_conversion import to_llava_config, to_tower_config  # noqa: PLC0415

    config = documents["config.json"]
    tokenizer = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    return {
        "config.json": to_llava_config(config, tied=not has_tensor(source, "lm_head.weight")),
        f"{CONVERTED_TOWER}/config.json": to_tower_config(config),
        # SGLang uses only the image processor and the tokenizer of a processor.
        "processor_config.json": {"processor_class": "LlavaProcessor"},
        "tokenizer_config.json": {name: value for name, value in tokenizer.items() if name != "processor_class"},
    }


def _correct_llava(checkpoint: Checkpoint, source: Path, tokenizer: Path) -> dict[str, Any]:
    """What LLaVA's own trainer writes otherwise, or not at all, into config.json, and SGLang needs."""
    # The trainer writes `llava_qwen` or `llava_llama`, which transformers does not know.
    corrected: dict[str, Any] = {"model_type": "llava"}
    # Where the config has no value, transformers takes 32000. SGLang would put the image over the first token then.
    image_token_id = find_token_id(tokenizer, checkpoint.family.image_token[0])
    if image_token_id is None:
        image_token_id = checkpoint.image_token_id
    if image_token_id is not None:
        corrected["image_token_index"] = image_token_id
    # A number that is smaller than the embedding table makes the load fail.
    if embedding := find_shape(source, *_EMBEDDINGS):
        corrected["vocab_size"] = embedding[0]
    return corrected


def find_token_id(tokenizer: Path, token: str) -> int | None:
    """The id of an added token, from the files of a tokenizer; None if they do not name it."""
    if (tokenizer / "tokenizer.json").is_file():
        for added in read_json(tokenizer / "tokenizer.json").get("added_tokens") or ():
            if added["content"] == token:
                return int(added["id"])
    if (tokenizer / "tokenizer_config.json").is_file():
        for number, added in (read_json(tokenizer / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            if added["content"] == token:
                return int(number)
    if (tokenizer / "added_tokens.json").is_file():
        return read_json(tokenizer / "added_tokens.json").get(token)
    return None


def _find_vision_tower(checkpoint: Checkpoint, source: Path, named: str, revisions: Mapping[str, str]) -> Path | None:
    """The folder to stage as the vision tower; None if SGLang can load the checkpoint without."""
    if named and not Path(named).is_absolute() and (source / named / "config.json").is_file():
        tower = source / named
    elif Path(named).is_absolute() and Path(named).is_dir():
        return None
    elif checkpoint.vision_tower is not None:
        return _download(checkpoint.vision_tower, revisions, weights=True)
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


def _find_tokenizer(checkpoint: Checkpoint, source: Path, revisions: Mapping[str, str]) -> Path | None:
    """The folder of the tokenizer, if it is not in the checkpoint; else None."""
    if checkpoint.tokenizer is None:
        folder = source
    elif (source / "tokenizer").is_dir():
        folder = source / "tokenizer"
    else:
        folder = _download(checkpoint.tokenizer, revisions, weights=False)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ConfigurationError(f"{folder} holds no tokenizer ({' or '.join(_TOKENIZERS)}): download it again.")
    return None if folder == source else folder


def _download(hub_id: str, revisions: Mapping[str, str], *, weights: bool) -> Path:
    """The snapshot of a hub repository, from the local cache if the hub is unreachable.

    `*.bin` is a pickle, and is taken only of a commit that an operator has chosen.
    """
    revision = revisions.get(hub_id)
    logger.info("fetching %s at %s from the hub or its local cache", hub_id, revision or "its newest commit")
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, ignore_patterns=list_ignored_files(weights=weights)))
        if weights and revision and not any(folder.glob("*.safetensors")):
            # Older repositories, for example CLIP's, have only PyTorch's format.
            ignored = list_ignored_files(weights=True, pickles=True)
            folder = Path(snapshot_download(hub_id, revision=revision, ignore_patterns=ignored))
    except GatedRepoError:
        problem = "is gated: accept its terms on huggingface.co and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "does not exist on the hub, or HF_TOKEN may not read it"
    except RevisionNotFoundError:
        problem = f"has no commit {revision}: correct SLUICE_MODEL_REVISIONS"
    except LocalEntryNotFoundError:
        problem = "is not in the local cache and the hub cannot be reached: give a local folder as SLUICE_MODEL"
    except (HfHubHTTPError, OSError) as error:
        problem = f"cannot be downloaded ({type(error).__name__})"
    else:
        if revision is None:
            logger.warning(
                "the hub chose the commit of %s; to get the same files at each start, add %s@%s to "
                "SLUICE_MODEL_REVISIONS",
                hub_id,
                hub_id,
                folder.name,
            )
        if weights and revision is None and not any(folder.glob("*.safetensors")):
            problem = (
                "has no weights in the format safetensors at its newest commit, and other formats are pickles: add the "
                f"commit that you trust to SLUICE_MODEL_REVISIONS, for example {hub_id}@{folder.name}, or give a local "
                "folder as SLUICE_MODEL"
            )
        else:
            if weights:
                require_weights(folder)
            return folder
    raise ConfigurationError(f"{hub_id} {problem}.")


def list_ignored_files(*, weights: bool, pickles: bool = False) -> list[str]:
    """The patterns of the files of a hub repository that are not downloaded."""
    return [*_IGNORED_FILES, *(() if pickles else ("*.bin",)), *(() if weights else ("*.safetensors",))]


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
            rename_tensors(draft, lambda name: name.removeprefix(checkpoint.tensor_prefix))
        if checkpoint.is_converted:
            from services.guard.onevision_conversion import to_llava_name, to_tower_name  # noqa: PLC0415

            extract_tensors(source, to_tower_name, draft / CONVERTED_TOWER / "model.safetensors")
            rename_tensors(draft, to_llava_name)
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
