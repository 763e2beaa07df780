"""The command line and the environment of the SGLang server."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.guard.checkpoints import Checkpoint
from services.guard.gpus import compute_mem_fraction_static

_CPU_FLAGS: Final = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mm-attention-backend", "sdpa"),
    "--disable-cuda-graph",
    *("--max-total-tokens", "16384"),
    *("--mem-fraction-static", "0.3"),
)

_CUDA_FLAGS: Final = (
    # A chunk boundary inside an image encodes the whole image again, so chunks are long.
    *("--chunked-prefill-size", "32768"),
    *("--max-prefill-tokens", "65536"),
)

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

_WITHHELD_PREFIXES: Final = ("AWS_", "SLUICE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SGLANG_")
"""Credentials, and switches of SGLang, do not reach the engine."""

_WITHHELD: Final = frozenset(
    {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy", "pythondontwritebytecode"}
)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The options of a server that are the same at every start; port, key and scratch folder are new each time."""

    checkpoint: Checkpoint
    folder: Path
    """The staged checkpoint."""
    gpus: int
    """The number of GPUs; 0: the server runs on the CPU."""
    in_flight: int
    """Concurrent calls."""
    deadline_s: float
    """Seconds that a caller waits for one call."""
    tokenizer: Path | None = None
    """The folder of the tokenizer, if it is not `folder`."""
    gpu_share: float = 1.0
    """The share of one GPU, if replicas share it."""

    def command(self, *, port: int, secrets: Path) -> list[str]:
        """The argv. `secrets` is a file of flags that must not show in a process list."""
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(self.folder)),
            *("--port", str(port)),
            *("--config", str(secrets)),
            # More than the concurrent calls and the probes.
            *("--max-queued-requests", str(2 * self.in_flight + 16)),
            *_COMMON_FLAGS,
            *(self._cuda_flags() if self.gpus else _CPU_FLAGS),
            *(("--tokenizer-path", str(self.tokenizer)) if self.tokenizer else ()),
            *self.checkpoint.launch_flags,
            *(self.checkpoint.cuda_flags if self.gpus else ()),
        ]

    def _cuda_flags(self) -> tuple[str, ...]:
        fraction = compute_mem_fraction_static(self.gpu_share)
        return (*_CUDA_FLAGS, "--tp-size", str(self.gpus), "--mem-fraction-static", f"{fraction:.2f}")

    def environment(self, inherited: Mapping[str, str], *, scratch: Path) -> dict[str, str]:
        """The server's variables, and `inherited` without credentials, proxies and SGLang's own switches."""
        kept = {
            name: value
            for name, value in inherited.items()
            if not name.startswith(_WITHHELD_PREFIXES) and name.lower() not in _WITHHELD
        }
        kept |= {
            # All files are staged, so the server needs no network.
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(scratch),
            # An image waits this long for a preprocessing worker before SGLang replaces the whole pool of them.
            "REQUEST_TIMEOUT": str(max(10, int(self.deadline_s))),
            "SGLANG_CPU_WORKERS": str(min(self.in_flight, os.cpu_count() or 1)),
        }
        if not self.gpus:
            kept["OMP_NUM_THREADS"] = "1"
        return kept


def write_secrets(path: Path, *, api_key: str) -> None:
    """The API key as a file of flags, readable by this user only."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"api-key: {api_key}\n")
