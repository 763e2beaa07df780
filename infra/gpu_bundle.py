"""Pack what a GPU machine without internet lacks for `benchmarks/guard_gpu.py`: SGLang, its imports, and Sluice.

On the GPU machine, list its packages. Any other way to know them will do: one `name` or `name==version` in a line.

    python3 -m pip list --format=freeze > have.txt

On a machine with internet:

    python infra/gpu_bundle.py --have have.txt --out bundle [--part-mb 60]

Then copy the folder `bundle` to the GPU machine, in several transfers if it has several parts, and run there:

    python3 bundle/unpack.py /tmp/sluice          # prints the command of the benchmark

`infra/gpu_bundle.toml` lists the packages with their versions, the files that are left out, and stand-ins for modules
of which only a name is imported. The wheels come from pip's index, without their dependencies. A package is not packed
if the machine has it in the listed version. Then everything is compressed together, which takes minutes and two thirds
of the size of the wheels, and divided into parts.

`--check PYTHON` finds a missing module before the GPU costs anything. PYTHON is an interpreter with the packages of
`have.txt`. With it, the bundle is unpacked, and the engine is imported and asked to parse Sluice's flags: once as on a
CPU, and once with a pretended GPU of Hopper's generation. The kernels are linked to NVIDIA's driver, so the check makes
a stand-in for it, and needs `nm` and a C compiler.
"""

import argparse
import fnmatch
import io
import lzma
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = Path(__file__).with_suffix(".toml")
NAME: Final = "bundle.tar.xz"
SOURCES: Final = ("services", "pipelines", "benchmarks", "LICENSE")
"""Files of Sluice that the benchmark needs."""
_PLATFORMS: Final = (*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)), "manylinux2014_x86_64")
_LEFT_OUT: Final = ("*.pyc", "*/__pycache__/*", "*/tests/*", "*.c", "*.cpp", "*.pyi", "*.pyx")
_KEPT: Final = ("flashinfer/*", "tvm_ffi/*", "sglang/*", "sgl_kernel/*")
"""Their C++ sources are compiled on the machine."""
MEGABYTE: Final = 1_000_000

UNPACK: Final = '''"""Unpack the parts beside this file into a folder, and print the command of the benchmark.

    python3 unpack.py FOLDER
"""

import compileall
import lzma
import os
import sys
import tarfile
from pathlib import Path


def unpack(target: Path) -> None:
    here = Path(__file__).resolve().parent
    parts = sorted(here.glob("{name}.[0-9][0-9]"))
    if len(parts) != {count}:
        sys.exit(f"{{here}} has {{len(parts)}} of {count} parts; copy the missing ones.")
    joined = target / "{name}"
    target.mkdir(parents=True, exist_ok=True)
    with joined.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    with lzma.open(joined) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
        archive.extractall(target, filter="data")
    joined.unlink()
    os.environ["PYTHONWARNINGS"] = "ignore"
    compileall.compile_dir(target, quiet=2, workers=os.cpu_count() or 1)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    unpack(folder)
    print(f"cd {{folder}}/sluice && PYTHONPATH={{folder}}/site:{{folder}}/sluice "
          f"{{sys.executable}} benchmarks/guard_gpu.py --smoke --engine-flags='{flags}'")
'''

CHECK: Final = """
import sys, types
pretend = sys.argv[1] == "gpu"
import torch
if pretend:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA H200"
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, name="NVIDIA H200", warp_size=32,
        shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048)
import sglang.launch_server
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler
import sglang.srt.managers.detokenizer_manager
import sglang.srt.model_executor.model_runner
import sglang.srt.multimodal.processors.llava
import sglang.srt.constrained.xgrammar_backend
from sglang.srt.models.registry import ModelRegistry
assert "LlavaQwenForCausalLM" in ModelRegistry.get_supported_archs()
if pretend:
    import sglang.srt.layers.attention.triton_backend
import benchmarks.guard_gpu, benchmarks.made_up_images
import services.images.decoder_process

# The engine must know every flag.
import argparse
from pathlib import Path
from sglang.srt.server_args import ServerArgs
from services.guard.checkpoints import resolve_checkpoint
from services.guard.gpu_memory import MemoryPlan
from services.guard.sglang_command import LaunchConfig
benchmarks.older_sglang.adapt()
row = resolve_checkpoint(benchmarks.guard_gpu.ROWS["7B"])
plan = MemoryPlan(1, 64, 32768, 500_000) if pretend else None
flags = (*sys.argv[2:], "--chat-template", "chatml-llava") if pretend else ()
config = LaunchConfig(row, Path("/model"), plan, in_flight=64, deadline_s=60, engine_flags=flags)
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
argv = config.command(port=1, secrets=Path("/secrets"))[3:]
at = argv.index("--config")  # the server itself reads this one
parser.parse_args(argv[:at] + argv[at + 2:])
print("imported on", "a pretended GPU" if pretend else "the CPU")
"""


@dataclass(frozen=True, slots=True)
class Package:
    """One package of the table."""

    name: str
    version: str
    leave_out: Sequence[str] = ()


def normalize(name: str) -> str:
    """A name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_packages(table: Mapping[str, Any]) -> list[Package]:
    return [Package(name, row["version"], row.get("leave_out", ())) for name, row in table["packages"].items()]


def read_have(text: str) -> dict[str, str | None]:
    """The machine's packages, with their versions where they are known."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name:
            found[normalize(name.strip())] = version.strip() or None
    return found


def choose_packages(packages: Sequence[Package], have: Mapping[str, str | None]) -> list[Package]:
    """Those that the machine does not have in this version."""
    return [each for each in packages if have.get(normalize(each.name)) != each.version]


def check_torch(wanted: str, have: Mapping[str, str | None]) -> None:
    """
    Raises:
        SystemExit: the machine has no PyTorch, or another one than the kernels of the table are compiled for.
    """
    if "torch" not in have:
        sys.exit(f"The machine has no PyTorch, which is too large to carry. The table needs {wanted}.")
    found = (have["torch"] or wanted).partition("+")[0]
    if found != wanted:
        sys.exit(
            f"The machine has PyTorch {found}, and the kernels of the table are compiled for {wanted}. Change the "
            f"versions in {TABLE.name} to those of the newest SGLang that requires PyTorch {found}."
        )


def download(packages: Sequence[Package], python: str, wheels: Path) -> dict[str, Path]:
    """The wheel of each package. Those of an earlier run are used again."""
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    missing = [each for each in packages if _find_wheel(each, wheels) is None]
    if missing:
        subprocess.run([*command, *(f"{each.name}=={each.version}" for each in missing)], check=True)
    found = {each.name: _find_wheel(each, wheels) for each in packages}
    if absent := [name for name, wheel in found.items() if wheel is None]:
        sys.exit(f"pip downloaded no wheel for {', '.join(absent)}; correct the version in {TABLE.name}.")
    return {name: wheel for name, wheel in found.items() if wheel is not None}


def _find_wheel(package: Package, wheels: Path) -> Path | None:
    for wheel in wheels.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        if (normalize(name), version) == (normalize(package.name), package.version):
            return wheel
    return None


def is_left_out(path: str, patterns: Sequence[str]) -> bool:
    """Whether a file of a package stays behind: by the package's patterns, or because no package needs such files."""
    if any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
        return True
    kept = any(fnmatch.fnmatch(path, pattern) for pattern in _KEPT)
    return any(fnmatch.fnmatch(path, pattern) for pattern in (_LEFT_OUT[:2] if kept else _LEFT_OUT))


def list_contents(wheels: Mapping[Path, Sequence[str]]) -> Iterator[tuple[str, bytes]]:
    """The files of wheels, as pip would place them in `site-packages`."""
    for wheel, leave_out in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                # `x.data/purelib` belongs into the same folder; scripts and headers are not needed.
                path = re.sub(r"^[^/]+\.data/(?:pure|plat)lib/", "", name)
                if not path.endswith("/") and ".data/" not in path and not is_left_out(path, leave_out):
                    yield path, archive.read(name)


def list_sources() -> Iterator[tuple[str, bytes]]:
    for name in SOURCES:
        start = ROOT / name
        for path in sorted([start] if start.is_file() else start.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path.read_bytes()


def write_archive(target: Path, files: Iterator[tuple[str, bytes]], *, preset: int) -> int:
    """Write a compressed archive. Returns the bytes of its files. Similar files are neighbours: by suffix and path."""
    found = sorted(files, key=lambda file: (Path(file[0]).suffix, file[0]))
    with lzma.open(target, "wb", preset=preset) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for name, content in found:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755 if ".so" in name else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return sum(len(content) for _, content in found)


def split(archive: Path, part_bytes: int) -> list[Path]:
    """Divide a file into numbered parts, and delete it."""
    parts: list[Path] = []
    with archive.open("rb") as whole:
        while content := whole.read(part_bytes):
            parts.append(archive.with_name(f"{archive.name}.{len(parts):02}"))
            parts[-1].write_bytes(content)
    archive.unlink()
    return parts


def check(out: Path, python: str, engine_flags: str) -> None:
    """Unpack the bundle and import the engine with another interpreter.

    Raises:
        SystemExit: a module is missing, or the engine does not know a flag.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-bundle-") as name:
        folder = Path(name)
        subprocess.run([python, str(out / "unpack.py"), name], check=True, stdout=subprocess.DEVNULL)
        _make_driver(folder)
        env = {
            "PATH": os.environ["PATH"],
            "HOME": name,
            "PYTHONPATH": f"{name}/site:{name}/sluice",
            "LD_LIBRARY_PATH": f"{name}/driver",
        }
        for device in ("cpu", "gpu"):
            command = [python, "-W", "ignore", "-c", CHECK, device, *shlex.split(engine_flags)]
            if subprocess.run(command, env=env, check=False, cwd=folder).returncode:
                sys.exit(f"The engine cannot be imported on the {device}, for the reason above. Correct {TABLE.name}.")


def _make_driver(folder: Path) -> None:
    """A `libcuda.so.1` whose functions fail, with the names that the kernels are linked to."""
    libraries = [str(path) for path in (folder / "site").rglob("*.so")]
    done = subprocess.run(["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True)
    names = sorted(set(re.findall(r" U (cu[A-Z]\w+)$", done.stdout, re.MULTILINE)))
    driver = folder / "driver"
    driver.mkdir()
    (driver / "driver.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    command = ["cc", "-shared", "-fPIC", "-o", str(driver / "libcuda.so.1"), str(driver / "driver.c")]
    subprocess.run(command, check=True)


def main(arguments: argparse.Namespace) -> None:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    have = read_have(arguments.have.read_text(encoding="utf-8"))
    check_torch(table["torch"], have)
    chosen = choose_packages(read_packages(table), have)
    wheels = download(chosen, table["python"], arguments.wheels)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{NAME}*"):
        old.unlink()

    def list_files() -> Iterator[tuple[str, bytes]]:
        for path, content in list_contents({wheels[each.name]: each.leave_out for each in chosen}):
            yield f"site/{path}", content
        for path, text in table["stand_ins"].items():
            yield f"site/{path}", text.lstrip("\n").encode()
        for path, content in list_sources():
            yield f"sluice/{path}", content

    size = write_archive(out / NAME, list_files(), preset=arguments.preset)
    parts = split(out / NAME, int(arguments.part_mb * MEGABYTE))
    unpack = UNPACK.format(name=NAME, count=len(parts), flags=table["engine_flags"])
    (out / "unpack.py").write_text(unpack, encoding="utf-8")
    packed = sum(part.stat().st_size for part in parts)
    print(
        f"{len(chosen)} packages, {size / MEGABYTE:.0f} MB, packed {packed / MEGABYTE:.1f} MB in {len(parts)} part(s)"
    )
    if arguments.check:
        check(out, arguments.check, table["engine_flags"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, required=True, help="the packages of the GPU machine")
    parser.add_argument("--out", type=Path, default=Path("bundle"))
    parser.add_argument("--part-mb", type=float, default=60, help="the size of a part at most, in megabytes")
    parser.add_argument("--wheels", type=Path, default=Path("bundle-wheels"), help="keeps the downloads (600 MB)")
    parser.add_argument("--preset", type=int, default=6, choices=range(10), help="of the compression; 9 is smallest")
    parser.add_argument("--check", metavar="PYTHON", help="an interpreter with the machine's packages")
    main(parser.parse_args())
