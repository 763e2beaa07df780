"""The address of a Ray cluster, before Ray itself is asked, which takes half a minute to say that nothing is there."""

import socket
from typing import Final
from urllib.parse import urlsplit

NO_CLUSTER: Final = {"", "local"}
"""Addresses with which Ray starts a new cluster instead of joining one."""
_ANSWER_S: Final = 3.0


def answers(address: str) -> bool:
    """Whether something listens there; an address that is not host:port is Ray's to understand. Blocks, 3 s at most."""
    place = urlsplit(f"//{address.removeprefix('ray://')}")
    try:
        if place.hostname is None or place.port is None:
            return True
        with socket.create_connection((place.hostname, place.port), timeout=_ANSWER_S):
            return True
    except (OSError, ValueError):
        return False
