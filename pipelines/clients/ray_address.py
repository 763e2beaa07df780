"""Checks the address of a Ray cluster without Ray, which takes half a minute to report that nothing is there."""

import socket
from typing import Final
from urllib.parse import urlsplit

NO_CLUSTER: Final = {"", "local"}
"""Addresses with which Ray starts a new cluster instead of joining one."""
_CONNECT_S: Final = 3.0


def is_reachable(address: str) -> bool:
    """Whether something listens at an address. True for an address that only Ray can parse. Blocks for up to 3 s."""
    parts = urlsplit(f"//{address.removeprefix('ray://')}")
    try:
        if parts.hostname is None or parts.port is None:
            return True
        with socket.create_connection((parts.hostname, parts.port), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False
