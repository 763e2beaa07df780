"""The command line and the environment of the SGLang server."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.guard.checkpoints import Checkpoint
from services.guard.gpu_memory import MemoryPlan

_CPU_FLAGS: Final = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mm-attention-backend", "sdpa"),
    "--disable-cuda-graph",
    *("--max-total-tokens", "16384"),
    *("--mem-fraction-static", "0.3"),
)

_MEM_FRACTION_STATIC: Final = "0.90"
"""Weights and KV cache may use this much of the free memory. `--max-total-tokens` limits them to less."""
_SPARE_REQUESTS: Final = 8
"""Requests that the engine runs beside those in flight: probes, and requests that their callers have given up."""

_COMMON_FLAGS: Final = (
    *("--host", "127.0.0.1"),
    *("--allowed-media-domains", "invalid.invalid"),
    # Otherwise a checkpoint's generation_config.json sets sampling fields.
    *("--sampling-defaults", "openai"),
    *("--grammar-backend", "xgrammar"),
    *("--limit-mm-data-per-request", json.dumps({"image": 1})),
    "--enable-priority-scheduling",
    # `SglangServer.wait_until_ready` judges an image instead.
    "--skip-server-warmup",
    # An idle scheduler would use a whole core.
    "--sleep-on-idle",
    # Otherwise SGLang logs a line for each batch.
    *("--log-level", "warning"),
    *("--log-level-http", "warning"),
)

_INHERITED: Final = frozenset(
    {
        # The process: programs, libraries, user, caches, text.
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "CC", "CXX", "MAX_JOBS"),
        *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE"),
        # Compiled kernels.
        "SGLANG_CACHE_DIR",
        *("PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED", "PYTHONHASHSEED", "PYTHONFAULTHANDLER", "VIRTUAL_ENV"),
        # The GPUs. Not every NVIDIA_: NVIDIA_API_KEY is a credential.
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    }
)
_INHERITED_PREFIXES: Final = (
    *("LC_", "CUDA_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "FLASHINFER_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_"),
)
"""Variables of the libraries that compute. Everything else stays here: credentials, proxies, Ray, SGLang's switches."""

_CREDENTIAL_WORDS: Final = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY")
"""A variable with such a word in its name stays here even if its prefix is listed."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The options of a server that are the same at every start; port, key and scratch folder are new each time."""

    checkpoint: Checkpoint
    folder: Path
    """The staged checkpoint."""
    plan: MemoryPlan | None
    """How the server uses its GPUs; None: it runs on the CPU."""
    in_flight: int
    """Concurrent calls."""
    deadline_s: float
    """Seconds that a caller waits for one call."""
    tokenizer: Path | None = None
    """The folder of the tokenizer, if it is not `folder`."""
    engine_flags: tuple[str, ...] = ()
    """The operator's flags. They come last, because the last one counts."""

    def command(self, *, port: int, secrets: Path) -> list[str]:
        """The argv. `secrets` is a file of flags that must not show in a process list."""
        return [
            *(sys.executable, "-P", "-m", "sglang.launch_server"),
            *("--model-path", str(self.folder)),
            *("--port", str(port)),
            *("--config", str(secrets)),
            # More than the concurrent calls and the probes.
            *("--max-queued-requests", str(2 * self.in_flight + 16)),
            *_COMMON_FLAGS,
            *(_make_cuda_flags(self.plan) if self.plan else _CPU_FLAGS),
            *(("--tokenizer-path", str(self.tokenizer)) if self.tokenizer else ()),
            *self.checkpoint.launch_flags,
            *(self.checkpoint.cuda_flags if self.plan else ()),
            *self.engine_flags,
        ]

    def environment(self, inherited: Mapping[str, str], *, port: int, scratch: Path) -> dict[str, str]:
        """The server's own variables, and those of `inherited` that a library needs to compute."""
        kept = {name: value for name, value in inherited.items() if _is_inherited(name)}
        kept |= {
            "PYTHONSAFEPATH": "1",  # its processes import nothing from the present folder
            # All files are staged, so the server needs no network.
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(scratch),
            # An image waits this long for a preprocessing worker before SGLang replaces the whole pool of them.
            "REQUEST_TIMEOUT": str(max(10, int(self.deadline_s))),
            "SGLANG_CPU_WORKERS": str(min(self.in_flight, os.cpu_count() or 1)),
            # The ranks of an engine are on one machine and connect over loopback. They find one another by a file:
            # PyTorch's TCP store has no authentication and listens on all addresses.
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch / 'ranks'}",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            # SGLang derives the names of its shared memory from this address. It does not listen there.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if not self.plan:
            kept["OMP_NUM_THREADS"] = "1"
        return kept


def _make_cuda_flags(plan: MemoryPlan) -> tuple[str, ...]:
    return (
        *("--tp-size", str(plan.gpus)),
        *("--mem-fraction-static", _MEM_FRACTION_STATIC),
        *("--max-total-tokens", str(plan.kv_tokens)),
        *("--chunked-prefill-size", str(plan.prefill_tokens)),
        *("--max-prefill-tokens", str(plan.prefill_tokens)),
        *("--max-running-requests", str(plan.in_flight + _SPARE_REQUESTS)),
        # Otherwise an H100 captures 36 graphs for up to 256 requests, which takes seconds and gigabytes.
        *("--cuda-graph-max-bs-decode", str(plan.in_flight)),
    )


def _is_inherited(name: str) -> bool:
    listed = name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    return listed and not any(word in name for word in _CREDENTIAL_WORDS)


def write_secrets(path: Path, *, api_key: str) -> None:
    """The API key as a file of flags, readable by this user only."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"api-key: {api_key}\n")
