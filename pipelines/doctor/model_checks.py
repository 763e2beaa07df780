"""Checks of the model: its files or the access to them, the disk, and the memory for it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.doctor.checks import CheckResult, explain_elsewhere, failed, passed, runs_elsewhere
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard.checkpoint_staging import list_ignored_files
from services.guard.checkpoints import Checkpoint, order_image, resolve_checkpoint
from services.guard.gpu_memory import GIB
from services.guard.gpus import plan_gpus
from services.guard.preflight import GpuMachine, check_memory
from services.guard.safetensors import read_json, require_weights
from services.images.decoder_limits import find_memory_bytes

_BYTES_PER_PARAMETER: Final = 2
"""Of the weights in a file."""
_CPU_BYTES_PER_PARAMETER: Final = 6
"""On a CPU the engine also computes with a copy in single precision."""
_CPU_PROCESSES_BYTES: Final = 3 * GIB
"""The processes of the engine on a CPU."""
_STAGED_BYTES: Final = 256 << 20
"""A staged checkpoint whose weights are links: its small files, and logs."""


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A repository on the hub that a checkpoint needs."""

    hub_id: str
    has_weights: bool
    """False: only the tokenizer and the image processor are used."""


def run_model_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `model` and `model disk`."""
    if runs_elsewhere(settings):
        yield from (passed(check, explain_elsewhere(settings)) for check in ("model", "model disk"))
        return
    checkpoint = order_image(resolve_checkpoint(settings.model), settings.image_order)
    if checkpoint.folder is not None:
        require_weights(checkpoint.folder)
    revisions = {name: commit for name, _, commit in (pair.partition("@") for pair in settings.model_revisions)}
    missing = [files for files in list_hub_files(checkpoint) if not _is_cached(files, revisions)]
    download_bytes = sum(_measure_download(files, revisions) for files in missing)
    if missing:
        yield passed("model", f"can be downloaded: {', '.join(files.hub_id for files in missing)}")
    else:
        yield passed("model", f"{checkpoint.name} is on this machine")
    yield check_disk(settings, checkpoint, download_bytes)


def check_disk(settings: Settings, checkpoint: Checkpoint, download_bytes: int) -> CheckResult:
    """Check the room for the download, and in the folder of the staged checkpoints."""
    wanted = [
        (Path(constants.HF_HUB_CACHE), download_bytes, "HF_HOME"),
        (settings.state_dir.expanduser(), _count_staged_bytes(settings, checkpoint), "SLUICE_STATE_DIR"),
    ]
    wanted_on: dict[int, int] = {}  # by disk: both folders may be on one
    for folder, size, variable in wanted:
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        if not size:
            continue
        if not os.access(existing, os.W_OK):
            return failed("model disk", f"{existing} cannot be written: give this user the right, or set {variable}")
        disk = existing.stat().st_dev
        wanted_on[disk] = wanted_on.get(disk, 0) + size
        free = shutil.disk_usage(existing).free
        if free < wanted_on[disk]:
            return failed(
                "model disk",
                f"{existing} has {free / GIB:.1f} GiB free, and the model needs {wanted_on[disk] / GIB:.1f} GiB: make "
                "room, or set HF_HOME (downloads) or SLUICE_STATE_DIR (staged checkpoints) to a larger disk",
            )
    if not download_bytes:
        return passed("model disk", "nothing to download, and there is room for a staged checkpoint")
    return passed("model disk", f"{download_bytes / GIB:.1f} GiB to download, and there is room")


def _count_staged_bytes(settings: Settings, checkpoint: Checkpoint) -> int:
    """What staging will write: links to the weights, or the whole weights if their tensors get other names."""
    is_rewritten = checkpoint.is_converted or bool(checkpoint.tensor_prefix)
    if is_rewritten and not any((settings.state_dir.expanduser() / "checkpoints").glob(f"{checkpoint.name}-*")):
        return checkpoint.parameters * _BYTES_PER_PARAMETER + _STAGED_BYTES
    return _STAGED_BYTES


def check_model_memory(settings: Settings, machine: GpuMachine) -> CheckResult:
    """The result of `model memory`: whether the GPUs of a guard, or else the CPU's memory, hold the checkpoint."""
    checkpoint = resolve_checkpoint(settings.model)
    if machine.gpus and settings.guard_gpus != 0:
        finding = check_memory(machine, checkpoint, settings.guard_gpus)
        return CheckResult("model memory", finding.is_ok, finding.detail)
    try:
        plan_gpus(checkpoint, requested=settings.guard_gpus)
    except ConfigurationError as error:
        return failed("model memory", str(error))
    return check_cpu_memory(checkpoint, find_memory_bytes())


def check_cpu_memory(checkpoint: Checkpoint, memory_bytes: int) -> CheckResult:
    """Check that a machine or container with this memory holds the checkpoint without a GPU."""
    wanted = checkpoint.parameters * _CPU_BYTES_PER_PARAMETER + _CPU_PROCESSES_BYTES
    detail = (
        f"{checkpoint.name} on the CPU needs {wanted / GIB:.0f} GiB of memory, and there are {memory_bytes / GIB:.0f}"
    )
    if memory_bytes < wanted:
        return failed("model memory", f"{detail} GiB: use a machine or container with more memory, or with a GPU")
    return passed("model memory", f"{detail} GiB")


def list_hub_files(checkpoint: Checkpoint) -> list[HubFiles]:
    """The repositories that staging the checkpoint takes from the hub: what a local folder has is taken from there."""
    folder = checkpoint.folder
    found = [] if folder is not None else [HubFiles(checkpoint.hub_id or checkpoint.name, True)]
    if checkpoint.vision_tower and not _has_vision_tower(folder):
        found.append(HubFiles(checkpoint.vision_tower, True))
    if checkpoint.tokenizer and not (folder and (folder / "tokenizer").is_dir()):
        found.append(HubFiles(checkpoint.tokenizer, False))
    return found


def _has_vision_tower(folder: Path | None) -> bool:
    if folder is None:
        return False
    named = str(read_json(folder / "config.json").get("mm_vision_tower") or "")
    return bool(named) and (folder / named).is_dir()


def _is_cached(files: HubFiles, revisions: Mapping[str, str]) -> bool:
    try:
        folder = Path(snapshot_download(files.hub_id, revision=revisions.get(files.hub_id), local_files_only=True))
        if files.has_weights:
            require_weights(folder)
    except (LocalEntryNotFoundError, ConfigurationError, HfHubHTTPError, OSError):
        return False
    return True


def _measure_download(files: HubFiles, revisions: Mapping[str, str]) -> int:
    """The bytes that staging would download.

    Raises:
        ConfigurationError: the files cannot be downloaded; the sentence says why, and what to do.
    """
    hub, name, revision = HfApi(), files.hub_id, revisions.get(files.hub_id)
    remedy = "give a folder with the files as SLUICE_MODEL"
    try:
        hub.auth_check(name)
        sizes = {
            each.rfilename: each.size or 0
            for each in hub.model_info(name, revision=revision, files_metadata=True).siblings or ()
        }
    except GatedRepoError:
        problem = "is gated: accept its terms on huggingface.co, and run `hf auth login` or set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "does not exist on the hub, or your login may not read it: run `hf auth login` or set HF_TOKEN"
    except RevisionNotFoundError:
        problem = f"has no commit {revision}: correct SLUICE_MODEL_REVISIONS"
    except OfflineModeIsEnabled:
        problem = f"is not in the local cache, and HF_HUB_OFFLINE forbids a download: unset it, or {remedy}"
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        problem = (
            f"cannot be downloaded, because the hub does not answer ({type(error).__name__}): check the network and "
            f"HTTPS_PROXY, or {remedy}"
        )
    else:
        has_safetensors = any(file.endswith(".safetensors") for file in sizes)
        if not files.has_weights or has_safetensors or revision is not None:
            pickles = files.has_weights and not has_safetensors
            ignored = list_ignored_files(weights=files.has_weights, pickles=pickles)
            return sum(size for file, size in sizes.items() if not any(fnmatch(file, each) for each in ignored))
        problem = (
            "has no weights in the format safetensors, and other formats are pickles: add the commit that you trust to "
            "SLUICE_MODEL_REVISIONS, or give a local folder as SLUICE_MODEL"
        )
    raise ConfigurationError(f"{name} {problem}")
