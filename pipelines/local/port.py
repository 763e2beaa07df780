"""Reserves the gateway's port while the service runs, so that the replicas of the gateway can share it."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.doctor.machine_checks import check_port_free
from services.gateway.server import listen


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for processes of this user that listen on it with `services.gateway.server.listen`.

    Port 0 selects a free port. The socket that reserves it never listens, so it gets no connections.

    Raises:
        ConfigurationError: another service listens on the port.
    """
    if port:
        check_port_free(host, port)
    with listen(host, port) as keeper:
        yield int(keeper.getsockname()[1])
