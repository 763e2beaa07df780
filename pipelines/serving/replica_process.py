"""What the process of every replica does first: it keeps out others on the machine and on the network."""

import logging
import resource
from pathlib import Path
from typing import Any, Final

import ray
from ray.serve._private import replica as serve_replica

from services.core.processes import can_confine, forbid_tracing

_LOOPBACK: Final = "127.0.0.1"
_ALL_ADDRESSES: Final = "[::]:"
_CAP_SYS_PTRACE: Final = 19

logger = logging.getLogger(__name__)


def protect_replica() -> None:
    """Keep other processes from this one, and let Serve listen on loopback on a cluster that does.

    Landlock keeps the processes that read hostile images, the decoders and the engine, from all other processes. This
    process also forbids tracing where Landlock is missing, or where Ray's agent has the capability to read it anyway.
    Elsewhere it must not: the agent counts its open files and memory, and without them reports nothing of the node.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain credentials
    confined = can_confine()
    if not confined or _has_capability(_CAP_SYS_PTRACE):
        forbid_tracing()
    if not confined and not _has_capability(_CAP_SYS_PTRACE):
        logger.warning(
            "the kernel has no Landlock, so this replica forbids tracing, and Ray reports no metrics of its node; "
            "to get them, use a kernel with Landlock"
        )
    if ray.is_initialized() and ray.util.get_node_ip_address() == _LOOPBACK:
        _keep_serve_on_loopback()


def _has_capability(number: int) -> bool:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def _keep_serve_on_loopback() -> None:
    """Serve opens a port of each replica for calls of other replicas, after the replica's `__init__`.

    It asks for Ray's token there, but listens on all addresses, and has no option for it.
    """
    add_port: Any = serve_replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace(_ALL_ADDRESSES, f"{_LOOPBACK}:", 1))

    serve_replica.add_port_to_grpc_server = add_loopback_port
