"""TCP ports for the servers of tests."""

import os
import random
import socket
from collections.abc import Iterator
from typing import Final

_FIRST: Final = 20_000
_COUNT: Final = 1_000
"""The ports of one worker. They end below those that Linux gives to clients, so a killed server finds its own free."""
_WORKERS: Final = 12


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that are free now and belong to no other worker of this run."""
    found: list[int] = []
    for port in _candidates():
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} free ports are wanted, and {len(found)} were found: end the servers of earlier runs")


def _candidates() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    first = _FIRST + worker * _COUNT
    yield from random.Random(os.urandom(8)).sample(range(first, first + _COUNT), _COUNT)
