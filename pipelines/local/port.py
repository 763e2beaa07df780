"""The gateway's port: kept for it from before its first replica listens until the service ends."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from services.core.errors import ConfigurationError
from services.gateway.server import listen


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Keep a port for the processes of this user that listen on it with `services.gateway.server.listen`.

    Port 0 is a free one. The socket that keeps it never listens, so it takes no connections from them.

    Raises:
        ConfigurationError: another service listens there already.
    """
    if port:
        _check_free(host, port)
    with listen(host, port) as keeper:
        yield int(keeper.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Alone, which `listen` does not ask for: two services must not share the connections by mistake."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"the gateway cannot listen on {host}:{port} ({error.strerror}); set SLUICE_GATEWAY_HOST and "
                "SLUICE_GATEWAY_PORT to an address of this machine that is free, or SLUICE_GATEWAY_REPLICAS=0 for none"
            ) from None
