"""The bundle for a GPU machine without internet, with wheels of the test."""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from infra import gpu_bundle
from infra.gpu_bundle import Package, check_torch, choose_packages, is_left_out, read_have, read_packages

TABLE = """
python = "3.12"
torch = "2.11.0"
engine_flags = "--attention-backend triton"
[packages.a-demo]
version = "1.0"
leave_out = ["a_demo/large*"]
[packages.present]
version = "2.0"
[stand_ins]
"ray/__init__.py" = ""
"ray/util/__init__.py" = ""
"ray/util/metrics.py" = "stand_in = True"
"""
HAVE = "torch==2.11.0+cu130\nPresent==2.0  # as the table\nnumpy\n"


def write_wheel(wheels: Path, name: str, files: dict[str, bytes]) -> None:
    wheels.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheels / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle in parts of 200 kB."""
    table = tmp_path / "table.toml"
    table.write_text(TABLE)
    monkeypatch.setattr(gpu_bundle, "TABLE", table)
    (tmp_path / "have.txt").write_text(HAVE)
    files = {
        "a_demo/__init__.py": b"there = 1\n",
        "a_demo/large.so": b"left out",
        "a_demo/tests/test_a.py": b"left out",
        "a_demo/kernel.so": os.urandom(300_000),
        "a_demo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: a-demo\nVersion: 1.0\n",
        "a_demo-1.0.data/purelib/beside.py": b"there = 2\n",
        "a_demo-1.0.data/scripts/run": b"left out",
    }
    write_wheel(tmp_path / "wheels", "a_demo-1.0-py3-none-any.whl", files)
    out = tmp_path / "bundle"
    gpu_bundle.main(
        argparse.Namespace(
            have=tmp_path / "have.txt", out=out, part_mb=0.2, wheels=tmp_path / "wheels", preset=0, check=None
        )
    )
    return out


def unpack(bundle: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(bundle / "unpack.py"), str(target)], capture_output=True, text=True, check=False
    )


def test_bundle_unpacks_to_packages_stand_ins_and_a_benchmark_that_starts(bundle: Path, tmp_path: Path) -> None:
    parts = sorted(bundle.glob("*.xz.*"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 200_000

    target = tmp_path / "target"
    done = unpack(bundle, target)
    assert done.returncode == 0, done.stderr
    site = target / "site"
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert found == {
        "a_demo/__init__.py",
        "a_demo/kernel.so",
        "a_demo-1.0.dist-info/METADATA",
        "beside.py",
        "ray/__init__.py",
        "ray/util/__init__.py",
        "ray/util/metrics.py",
    }
    # The printed command, with other arguments.
    assert done.stdout.endswith("benchmarks/guard_gpu.py --smoke --engine-flags='--attention-backend triton'\n")
    results = subprocess.run(
        [sys.executable, "-c", "import benchmarks.guard_gpu as b; print(b.__file__)"],
        env=os.environ | {"PYTHONPATH": f"{target}/sluice"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert results.stdout.strip() == str(target / "sluice" / "benchmarks" / "guard_gpu.py")


def test_missing_part_is_named(bundle: Path, tmp_path: Path) -> None:
    parts = sorted(bundle.glob("*.xz.*"))
    parts[-1].unlink()
    done = unpack(bundle, tmp_path / "target")
    assert done.returncode == 1
    assert f"has {len(parts) - 1} of {len(parts)} parts; copy the missing ones." in done.stderr


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        ("numpy==2.5.2\n", "The machine has no PyTorch"),
        ("torch==2.14.1\n", "has PyTorch 2.14.1, and the kernels of the table are compiled for 2.11.0"),
    ],
)
def test_machine_with_another_pytorch_is_refused(have: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        check_torch("2.11.0", read_have(have))


def test_packages_of_the_machine_are_packed_only_in_another_version() -> None:
    have = read_have("Jinja2==3.1\ntyping_extensions==4.16.0\nnumpy\n")
    packages = [
        Package("jinja2", "3.1"),
        Package("typing-extensions", "4.15.0"),
        Package("numpy", "2.5"),
        Package("x", "1"),
    ]
    assert [each.name for each in choose_packages(packages, have)] == ["typing-extensions", "numpy", "x"]


def test_table_leaves_out_large_kernels_and_keeps_what_the_engine_imports() -> None:
    table: Any = gpu_bundle.tomllib.loads(gpu_bundle.TABLE.read_text())
    rows = {each.name: each for each in read_packages(table)}
    kernels = rows["sglang-kernel"].leave_out
    for name in ("flash_ops.abi3.so", "flashmla_ops.abi3.so", "infllm_ops.so", "sm100/common_ops.abi3.so"):
        assert is_left_out(f"sgl_kernel/{name}", kernels)
    # `sgl_kernel` imports this package when it is imported.
    for name in ("infllm_v2/__init__.py", "flash_attn.py", "sm90/common_ops.abi3.so", "__init__.py"):
        assert not is_left_out(f"sgl_kernel/{name}", kernels)
    assert not is_left_out("tvm_ffi/include/tvm/ffi/c_api.h", ())
    assert not is_left_out("sglang/kernels/x/tests/a.cuh", rows["sglang"].leave_out)
