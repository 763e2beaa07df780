"""Flags for the engine that an operator adds: which are accepted, and how they are written."""

import shlex
from collections.abc import Sequence
from typing import Final

_REFUSED: Final = (
    # Where the engine listens, whom it connects to, and who may call it.
    *("--host", "--port", "--fastapi-root-path", "--api-key", "--admin-api-key", "--tool-server"),
    *("--ssl-ca-certs", "--ssl-certfile", "--ssl-keyfile", "--ssl-keyfile-password", "--enable-ssl-refresh"),
    *("--grpc-mode", "--grpc-port", "--grpc-http-sidecar-port", "--grpc-response-timeout-secs"),
    *("--smg-grpc-mode", "--smg-http-sidecar-port", "--gated-launch-port", "--engine-info-bootstrap-port"),
    *("--dist-init-addr", "--nccl-init-addr", "--nccl-port", "--nnodes", "--node-rank"),
    *("--disaggregation-mode", "--disaggregation-bootstrap-port", "--encoder-bootstrap-port", "--encoder-only"),
    *("--encoder-urls", "--encoder-register-urls", "--decoupled-spec-bind-endpoint", "--load-publish-endpoint"),
    *("--remote-instance-weight-loader-seed-instance-ip", "--remote-instance-weight-loader-seed-instance-service-port"),
    *("--remote-instance-weight-loader-send-weights-group-ports", "--kv-events-config", "--language-only"),
    *("--otlp-traces-endpoint", "--enable-trace", "--enable-http-worker-reuseport"),
    # What it reads, and what it runs.
    *("--config", "--decrypted-config-file", "--decrypted-draft-config-file", "--model", "--model-path"),
    *("--tokenizer-path", "--trust-remote-code", "--custom-weight-loader", "--forward-hooks"),
    *("--enable-custom-logit-processor", "--delete-ckpt-after-loading", "--trust-request-chat-template"),
    *("--allowed-media-domains", "--media-url-max-file-size-mb", "--limit-mm-data-per-request"),
    "--trust-mm-content-hashes",
    # What would write images and prompts to logs and files.
    *("--log-requests", "--log-requests-format", "--log-requests-level", "--log-requests-target"),
    *("--crash-dump-folder", "--debug-tensor-dump-input-file", "--debug-tensor-dump-output-folder"),
    *("--export-metrics-to-file", "--export-metrics-to-file-dir", "--msprobe-dump-config"),
)


def parse_engine_flags(flags: str | Sequence[str]) -> tuple[str, ...]:
    """Split flags as a shell does, and check them.

    Raises:
        ValueError: a flag would open the engine to others, make it read other files, or write images to files.
    """
    words = tuple(shlex.split(flags) if isinstance(flags, str) else flags)
    if words and not words[0].startswith("--"):
        raise ValueError(f"{words[0]!r} is no flag; flags begin with --")
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        # SGLang also accepts the beginning of a flag.
        if name.startswith("-") and (name == "--" or any(refused.startswith(name) for refused in _REFUSED)):
            raise ValueError(f"the engine's {word.partition('=')[0]} is set by Sluice alone; remove it")
    return words
