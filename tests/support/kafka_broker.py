"""An Apache Kafka broker for tests: fetched by Maven, run as a child process, on loopback.

broker = Broker(directory)
broker.start()
...  # broker.address
broker.kill(); broker.start()  # the same port, the same data
broker.stop()
"""

import fcntl
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Final

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from services.core.processes import SupervisedProcess
from tests.support.ports import free_ports

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / ".kafka"
"""Git-ignored: the jars, and the archive of loaded classes that makes the second start fast."""

_DEFINITION: Final = ROOT / "infra" / "kafka"
_CLUSTER_ID: Final = "c2x1aWNlLXRlc3QtY2x1cw"
_START_S: Final = 60.0
_FETCH_S: Final = 600.0


def missing() -> str | None:
    """Why no broker can be started here, as a sentence that says how to get one; None when it can."""
    absent = [command for command in ("java", "mvn") if shutil.which(command) is None]
    if absent:
        return (
            f"{' and '.join(absent)} not found: install Java 17 and Maven, or set SLUICE_TEST_KAFKA=host:port "
            "to use a broker that runs already"
        )
    return None


def fetch() -> Path:
    """The folder with the broker's jars; Maven fetches them the first time (about 100 MB).

    Raises:
        RuntimeError: Maven failed; with the end of its output.
    """
    pom = _DEFINITION / "pom.xml"
    jars = CACHE / "jars"
    stamp = CACHE / "pom.xml"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one run fetch once
        if stamp.exists() and stamp.read_bytes() == pom.read_bytes():
            return jars
        stamp.unlink(missing_ok=True)
        shutil.rmtree(jars, ignore_errors=True)
        for archive in CACHE.glob("*.jsa"):
            archive.unlink()
        command = ["mvn", "-B", "-q", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_FETCH_S, check=False)
        if done.returncode != 0:
            raise RuntimeError("Maven could not fetch Kafka:\n" + done.stdout.decode(errors="replace")[-2000:])
        shutil.copy(pom, stamp)
    return jars


class Broker:
    """One broker in KRaft mode. `directory` takes its settings, its data and its log."""

    def __init__(self, directory: Path, advertised: Sequence[int] = ()) -> None:
        """`advertised`: ports of proxies. Who comes through one of them is told to stay on it."""
        self.directory = directory
        self.port, self._controller_port, *behind = free_ports(2 + len(advertised))
        self.behind: Mapping[int, int] = dict(zip(advertised, behind, strict=True))
        """The port to which each proxy has to connect."""
        self._child: SupervisedProcess | None = None

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    @property
    def address(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it serves; the second time on the same port with the same data.

        Raises:
            RuntimeError: it did not come up; with the end of its log.
        """
        jars = fetch()
        self.directory.mkdir(parents=True, exist_ok=True)
        properties = self.directory / "server.properties"
        if not properties.exists():
            template = Template((_DEFINITION / "server.properties").read_text())
            properties.write_text(
                template.substitute(port=self.port, controller_port=self._controller_port, data=self.directory / "data")
                + self._more_listeners()
            )
            self._java(jars, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(properties))
        self._child = SupervisedProcess(_java(jars, "kafka.Kafka", str(properties)), log=self.directory / "broker.log")
        self._await_serving()

    def stop(self) -> None:
        """End it in an orderly way. Does nothing when it does not run."""
        if self._child is not None:
            self._child.stop(grace_s=20)
            self._child = None
            _keep(_archive("kafka.Kafka"))

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _await_serving(self) -> None:
        assert self._child is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._child.returncode is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    pass
                KafkaAdminClient(bootstrap_servers=self.address, bootstrap_timeout_ms=5_000).close()
            except (OSError, KafkaError):
                time.sleep(0.1)
            else:
                return
        log = self._child.tail()
        self.kill()
        raise RuntimeError(f"the Kafka broker did not start:\n{log}")

    def _more_listeners(self) -> str:
        """Settings that take the place of the ones above them in the file."""
        if not self.behind:
            return ""
        own = f"PLAINTEXT://127.0.0.1:{self.port}"
        ways = [(f"P{proxy}", proxy, port) for proxy, port in self.behind.items()]
        controller = f"CONTROLLER://127.0.0.1:{self._controller_port}"
        listeners = [own, controller, *(f"{name}://127.0.0.1:{port}" for name, _, port in ways)]
        advertised = [own, *(f"{name}://127.0.0.1:{proxy}" for name, proxy, _ in ways)]
        protocols = [f"{name}:PLAINTEXT" for name in ("PLAINTEXT", "CONTROLLER", *(name for name, _, _ in ways))]
        return (
            f"\nlisteners={','.join(listeners)}\nadvertised.listeners={','.join(advertised)}"
            f"\nlistener.security.protocol.map={','.join(protocols)}\n"
        )

    def _java(self, jars: Path, *argv: str) -> None:
        done = subprocess.run(
            _java(jars, *argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_START_S, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{argv[0]} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")
        _keep(_archive(argv[0]))


def _java(jars: Path, *argv: str) -> list[str]:
    archive = _archive(argv[0])
    return [
        "java",
        "-Xms128m",
        "-Xmx320m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        f"-XX:SharedArchiveFile={archive}" if archive.exists() else f"-XX:ArchiveClassesAtExit={_unfinished(archive)}",
        "-Xlog:disable",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        "-Djava.net.preferIPv4Stack=true",
        "-cp",
        os.pathsep.join(str(jar) for jar in sorted(jars.glob("*.jar"))),
        *argv,
    ]


def _archive(program: str) -> Path:
    """Loaded classes, kept from one start to the next: starts 2-3 times faster. A JVM of another version ignores it."""
    return CACHE / f"{program}.jsa"


def _unfinished(archive: Path) -> Path:
    return archive.with_suffix(f".{os.getpid()}")


def _keep(archive: Path) -> None:
    """The JVM writes its archive as it ends; only a whole one may be seen under the final name."""
    if _unfinished(archive).exists():
        _unfinished(archive).rename(archive)
