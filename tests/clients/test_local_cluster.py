"""The cluster that `sluice up` starts cannot be reached from other machines, nor entered by other users."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.clients.ray import make_private_folder
from services.core.errors import ConfigurationError

CLUSTER = """
import os, subprocess, sys
import psutil, ray
from pipelines.clients.ray import start_local_cluster

start_local_cluster(num_cpus=1)
assert ray.get(ray.remote(lambda: 1).remote()) == 1
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
for process in processes:
    for connection in process.net_connections("inet"):
        if connection.status == "LISTEN":
            print("listens", connection.laddr.ip)
join = (
    "import sys, ray; from pipelines.clients.ray import connect_to_cluster; connect_to_cluster(sys.argv[1]); "
    "print('joined', ray.get(ray.remote(lambda: 2).remote()))"
)
subprocess.run([sys.executable, "-c", join, ray.get_runtime_context().gcs_address], check=True)
"""


@pytest.mark.ray
def test_local_cluster_listens_on_loopback_and_can_be_joined(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        env=os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    listening = {line.removeprefix("listens ") for line in done.stdout.splitlines() if line.startswith("listens ")}
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert "joined 2" in done.stdout
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_folder_is_private(tmp_path: Path) -> None:
    assert make_private_folder(tmp_path / "ray").stat().st_mode & 0o777 == 0o700
    assert make_private_folder(tmp_path / "ray") == tmp_path / "ray"


def test_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="only this user can enter"):
        make_private_folder(tmp_path / "planted")


def test_link_to_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "planted").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigurationError, match="only this user can enter"):
        make_private_folder(tmp_path / "planted")
