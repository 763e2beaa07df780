"""The images, checked without a Docker engine: the Dockerfile, and the lock of each image against the tested lock."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

import pytest
import ray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.deployment_files import INFRA, ROOT

DOCKER: Final = INFRA / "docker"
TESTED: Final = ROOT / "requirements.lock"
ENGINE: Final = {"sglang", "torch", "transformers", "sglang-kernel", "flashinfer-python", "triton"}


def pinned(lock: Path) -> dict[str, tuple[str, ...]]:
    """The version and hashes of each package of a lock."""
    entries = re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8"))
    found = {}
    for entry in entries:
        if match := re.match(r"([A-Za-z0-9._-]+)==(\S+)", entry):
            found[canonicalize_name(match[1])] = (match[2], *sorted(re.findall(r"sha256:[0-9a-f]{64}", entry)))
    return found


def dependencies() -> set[str]:
    """The packages in the dependencies of pyproject.toml, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}


@pytest.mark.parametrize("role", ["cpu", "gpu"])
def test_image_lock_has_every_dependency_in_the_tested_version(role: str) -> None:
    tested, locked = pinned(TESTED), pinned(DOCKER / f"{role}.lock")
    left_out = set((DOCKER / "cpu.excludes").read_text().split()) if role == "cpu" else set()

    assert locked.items() <= tested.items(), "run `make lock`"
    assert all(len(entry) > 1 for entry in locked.values()), "a package without a hash"
    assert dependencies() - locked.keys() == left_out, "run `make lock`"
    assert not locked.keys() & {"pytest", "moto", "mypy"}


def test_only_the_gpu_image_has_the_engine() -> None:
    assert not ENGINE & pinned(DOCKER / "cpu.lock").keys()
    assert pinned(DOCKER / "gpu.lock").keys() >= ENGINE


def test_commands_and_deployments_import_with_the_packages_of_the_cpu_image() -> None:
    # Ray's wheel contains some packages itself, in its folder thirdparty_files.
    in_ray = {path.name for path in (Path(ray.__file__).parent / "thirdparty_files").iterdir()}
    left_out = pinned(TESTED).keys() - pinned(DOCKER / "cpu.lock").keys()
    absent = sorted(
        module
        for module, packages in packages_distributions().items()
        if {canonicalize_name(package) for package in packages} <= left_out and module not in in_ray
    )
    program = f"""
import sys
ABSENT = frozenset({absent!r})
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import pipelines.cli.main, pipelines.serving.build, pipelines.autoscaling.serve_policy
"""
    assert {"torch", "sglang", "moto"} <= set(absent)

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 0, done.stderr


def test_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint

    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def instructions() -> Iterator[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            yield name, arguments.strip()


def test_base_images_have_a_version_and_final_stages_a_user() -> None:
    stages: dict[str, str] = {}
    users: dict[str, str] = {}
    stage = ""
    for name, arguments in instructions():
        if name == "FROM":
            image, _, stage = arguments.partition(" AS ")
            stages[stage] = image
        elif name == "USER":
            users[stage] = arguments

    for image in stages.values():
        assert image in stages or re.search(r":\d", image), f"{image} has no version"
    assert users == {"cpu": "1000:1000", "gpu": "1000:1000"}


def test_every_installed_package_has_a_hash() -> None:
    commands = [arguments for name, arguments in instructions() if name == "RUN" and "pip install" in arguments]

    assert len(commands) == 6
    for command in commands:
        assert "--require-hashes -r /tmp/" in command or "--no-deps /wheels/*.whl" in command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"pip install (.*)", makefile):
        assert "--require-hashes -r " in line or "--no-deps --no-build-isolation -e ." in line


def test_lock_of_the_build_has_the_tested_version_of_setuptools_and_uv_with_hashes() -> None:
    build, tested = pinned(DOCKER / "build.lock"), pinned(TESTED)

    assert build.keys() == {"setuptools", "uv"}
    assert all(len(entry) > 1 for entry in build.values())
    assert build["setuptools"] == tested["setuptools"], "run `make lock`"
    (wanted,) = re.findall(r"^uv==(\S+)$", (DOCKER / "build.in").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert build["uv"][0] == wanted, "run `make lock`"


def test_build_context_has_every_copied_file() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name, arguments in instructions()
        if name == "COPY" and "--from=" not in arguments
        for source in [word for word in arguments.split() if not word.startswith("--")][:-1]
    }

    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in sent), f"{source} is not in .dockerignore"


@pytest.mark.parametrize(("ready", "node_answers", "healthy"), [(True, 1, True), (False, 0, True), (False, 1, False)])
def test_health_check_passes_if_sluice_is_ready_or_the_ray_node_answers(
    ready: bool, node_answers: int, healthy: bool, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {node_answers}\n")
    python.chmod(0o755)
    if ready:
        (tmp_path / ".sluice").mkdir()
        (tmp_path / ".sluice" / "env").touch()
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}

    done = subprocess.run([DOCKER / "healthy"], env=environment, check=False, capture_output=True)

    assert (done.returncode == 0) is healthy
