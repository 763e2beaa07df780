"""Reads the headers of safetensors files, and renames and copies tensors without loading them.

The format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from services.core.errors import ConfigurationError

_INDEX: Final = "model.safetensors.index.json"
_HEADER_LIMIT_BYTES: Final = 100_000_000  # The format's own limit.
_CHUNK_BYTES: Final = 16 << 20


def require_weights(folder: Path) -> None:
    """Check that the weights of a model are in its folder, and complete according to their headers.

    Raises:
        ConfigurationError: a file is missing or damaged; the error names the first one.
    """
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigurationError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} files of weights are missing): download "
                "the checkpoint again."
            )
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ConfigurationError(f"{folder} holds no weights (*.safetensors): download the checkpoint again.")
    for file in files:
        _header(file)


def count_parameters(folder: Path) -> int:
    """The number of parameters in the safetensors files of a folder and its subfolders."""
    tensors = (tensor for file in sorted(folder.rglob("*.safetensors")) for tensor in _tensors(_header(file)).values())
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def find_shape(folder: Path, *names: str) -> tuple[int, ...] | None:
    """The shape of the first tensor of these names in the safetensors files of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        header = _header(file)
        for name in names:
            if name in header:
                return tuple(header[name]["shape"])
    return None


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the tensors other names. A linked file is replaced; its target stays unchanged."""
    for file in sorted(folder.glob("*.safetensors")):
        header = _header(file)
        renamed = {name if name == "__metadata__" else rename(name): value for name, value in header.items()}
        if renamed != header:
            _rewrite(file, renamed)
    index = folder / _INDEX
    if index.is_file():
        document = read_json(index)
        weight_map = {rename(name): file for name, file in document.get("weight_map", {}).items()}
        index.write_text(json.dumps(document | {"weight_map": weight_map}, indent=2), encoding="utf-8")


def extract_tensors(folder: Path, rename: Callable[[str], str | None], target: Path) -> None:
    """Write the tensors for which `rename` returns a name to a new file, under that name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[tuple[Path, int, int]] = []
    end = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _tensors(_header(file)).items():
            if (new := rename(name)) is not None:
                start, stop = tensor["data_offsets"]
                parts.append((file, start, stop - start))
                header[new] = dict(tensor) | {"data_offsets": [end, end + stop - start]}
                end += stop - start
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        out.write(_encode(header))
        for file, start, length in parts:
            with file.open("rb") as source:
                source.seek(8 + int.from_bytes(source.read(8), "little") + start)
                for begin in range(0, length, _CHUNK_BYTES):
                    out.write(source.read(min(length - begin, _CHUNK_BYTES)))


def has_tensor(folder: Path, suffix: str) -> bool:
    """Whether a tensor in the safetensors files of a folder has a name that ends so."""
    return any(name.endswith(suffix) for file in folder.glob("*.safetensors") for name in _tensors(_header(file)))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigurationError: the file cannot be read, or is not a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path} is not a JSON object.")
    return document


def _tensors(header: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in header.items() if name != "__metadata__"}


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length)) if 0 < length <= _HEADER_LIMIT_BYTES else None
            size = os.fstat(content.fileno()).st_size
    except (OSError, ValueError):
        header = None
    if isinstance(header, dict) and size == 8 + length + _end(_tensors(header).values()):
        return header
    raise ConfigurationError(
        f"{file} is damaged, or only a Git LFS pointer to the weights: download the checkpoint again."
    )


def _end(tensors: Iterable[Mapping[str, Any]]) -> int:
    return max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)


def _encode(header: Mapping[str, Any]) -> bytes:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format requires aligned data.
    return len(encoded).to_bytes(8, "little") + encoded


def _rewrite(file: Path, header: Mapping[str, Any]) -> None:
    draft = file.with_name(f"{file.name}.draft")
    with file.open("rb") as source, draft.open("wb") as target:
        source.seek(8 + int.from_bytes(source.read(8), "little"))
        target.write(_encode(header))
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
    draft.replace(file)
