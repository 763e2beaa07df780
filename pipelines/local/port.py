"""Reserves the gateway's port while the service runs, so that the replicas of the gateway can share it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from services.core.errors import ConfigurationError
from services.gateway.server import listen


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for processes of this user that listen on it with `services.gateway.server.listen`.

    Port 0 selects a free port. The socket that reserves it never listens, so it gets no connections.

    Raises:
        ConfigurationError: another service listens on the port.
    """
    if port:
        _check_free(host, port)
    with listen(host, port) as keeper:
        yield int(keeper.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Bind without SO_REUSEPORT, so that a port that another service uses is an error."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"the gateway cannot listen on {host}:{port} ({error.strerror}); set SLUICE_GATEWAY_HOST and "
                "SLUICE_GATEWAY_PORT to an address of this machine that is free, or SLUICE_GATEWAY_REPLICAS=0 for none"
            ) from None
