"""A real S3 server for tests: moto in a process of its own."""

import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.core.processes import SupervisedProcess
from tests.support.ports import free_ports

_START_S = 60


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty S3 server; credentials for it are in the environment while the session runs."""
    program = shutil.which("moto_server", path=str(Path(sys.executable).parent)) or "moto_server"
    (port,) = free_ports(1)
    child = SupervisedProcess(
        [program, "-H", "127.0.0.1", "-p", str(port)], log=tmp_path_factory.mktemp("s3") / "moto.log"
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        try:
            _await_port(port, child)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.stop()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def _await_port(port: int, child: SupervisedProcess) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if child.returncode is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"moto did not start:\n{child.tail()}")
