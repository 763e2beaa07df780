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
    # Otherwise a checkpoint's generation_config.json fills in sampling fields.
    *("--sampling-defaults", "openai"),
    *("--grammar-backend", "xgrammar"),
    *("--limit-mm-data-per-request", json.dumps({"image": 1})),
    "--enable-priority-scheduling",
    # The engine judges an image of its own before it is called ready.
    "--skip-server-warmup",
    # A scheduler that has nothing to do would take a whole core to find that out.
    "--sleep-on-idle",
    # One line per batch otherwise, for ever.
    *("--log-level", "warning"),
    *("--log-level-http", "warning"),
)

_WITHHELD_PREFIXES: Final = ("AWS_", "SLUICE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SGLANG_")
"""The engine has no credentials, and nothing outside chooses its ways."""

_WITHHELD: Final = frozenset(
    {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy", "pythondontwritebytecode"}
)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """All that a server is started from, but for what is new each time: port, key and scratch folder."""

    checkpoint: Checkpoint
    folder: Path
    """The staged checkpoint."""
    gpus: int
    """How many it is spread over; 0: it runs on the CPU."""
    in_flight: int
    """Calls that it will get at a time."""
    deadline_s: float
    """What a caller waits for one of them."""
    tokenizer: Path | None = None
    """Where the tokenizer is, when not in `folder`."""
    gpu_share: float = 1.0
    """Of one GPU, where replicas share it."""

    def command(self, *, port: int, secrets: Path) -> list[str]:
        """The argv. `secrets` is a file of flags that must not show in a process list."""
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(self.folder)),
            *("--port", str(port)),
            *("--config", str(secrets)),
            # Above what is ever given to it: probes come on top.
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
        """What is inherited, without credentials, proxies and SGLang's own switches, and what the server needs."""
        kept = {
            name: value
            for name, value in inherited.items()
            if not name.startswith(_WITHHELD_PREFIXES) and name.lower() not in _WITHHELD
        }
        kept |= {
            # Everything was staged before: a server that wants the network has lost its way.
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
