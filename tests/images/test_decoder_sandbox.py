"""Attacks of a decoder that runs an attacker's code. Each tries what its sandbox forbids."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving.gateway_deployment import GatewayDeployment
from pipelines.serving.guard_deployment import GuardDeployment
from pipelines.serving.intake_deployment import IntakeDeployment
from services.core import telemetry
from services.core.errors import NotAnImage
from services.images.decoder_pool import DecoderPool
from services.images.decoder_sandbox import MEASURES
from tests.images.test_decoder_pool import BAD, GOOD, ROOT, decoders, misbehave, workers_of
from tests.support.images import make_settings
from tests.support.kernel import has, skip_without
from tests.support.pictures import FORMATS, encoded, picture

__all__ = ["decoders"]

REPORT = """
try:
    result = ({attack})
except OSError as error:
    raise OSError("refused " + str(error.errno))
raise OSError("succeeded " + repr(result)[:100])
"""

ATTACKS = {
    "seccomp": [
        "__import__('socket').socket()",
        "__import__('socket').socket(__import__('socket').AF_UNIX)",
        "__import__('socket').socketpair()",
        "__import__('os').execv('/bin/true', ['true'])",
        "__import__('os').fork()",
        "__import__('os').posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 0)",
        "os.pidfd_open(os.getppid())",
        "__import__('resource').prlimit(os.getppid(), __import__('resource').RLIMIT_NOFILE)",
    ],
    "landlock": [
        "__import__('io').open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "__import__('io').open(f'/proc/{os.getppid()}/mem', 'r+b').read()",
        "__import__('io').open('/etc/passwd').read()",
        "__import__('io').open('/proc/self/environ').read()",
        "os.listdir('/')",
        "__import__('io').open('/tmp/sluice-written-by-a-decoder', 'w')",
    ],
    "capabilities": ["__import__('os').setuid(1)"],
}
"""Attacks of a decoder that runs foreign code, by the measure that stops them."""


def refusal(attack: str) -> str:
    return textwrap.indent(REPORT.format(attack=attack), " " * 12).strip()


@pytest.mark.parametrize(
    ("measure", "attack"), [(measure, attack) for measure, attacks in ATTACKS.items() for attack in attacks]
)
async def test_decoder_that_runs_foreign_code_is_refused(decoders: Path, measure: str, attack: str) -> None:
    skip_without(measure)
    misbehave(decoders, refusal(attack))
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(NotAnImage, match=r"refused (1|13|38)$"):
            await preparer.prepare(BAD)
        assert (await preparer.prepare(GOOD)).data == GOOD
    finally:
        preparer.close()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("ptrace", "101, 16, os.getppid(), 0, 0"), ("connect", "42, 0, 0, 0"), ("x32 getpid", "0x40000000 + 39, 0")],
)
async def test_raw_system_call_is_refused(decoders: Path, call: str, arguments: str) -> None:
    skip_without("seccomp")
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    code = f"libc = ctypes.CDLL(None, use_errno=True); result = libc.syscall({arguments})"
    misbehave(decoders, f"{code}; raise OSError(f'{{result}} refused {{ctypes.get_errno()}}')")
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(NotAnImage, match=r"-1 refused (1|38)$"):
            await preparer.prepare(BAD)
    finally:
        preparer.close()


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> dict[str, float]:
    """The values of the metric, by measure."""
    values: dict[str, float] = {}
    monkeypatch.setattr(
        telemetry.DECODER_SANDBOX, "set", lambda value, tags: values.update({tags["measure"]: float(value)})
    )
    caplog.set_level("INFO")
    return values


async def test_kernel_shows_the_sandbox(reported: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    """Also on a kernel that lacks some measures: then the log and the metric name exactly these."""
    expected = {measure: float(has(measure)) for measure in MEASURES}
    missing = [measure for measure, value in expected.items() if not value]
    preparer = DecoderPool(make_settings(decode_workers=1, decode_deadline_s=7), 512)
    try:
        await preparer.prepare(GOOD)
        (worker,) = workers_of(os.getpid())
        status = read_status(worker.pid)
        assert status["NoNewPrivs"] == "1"
        assert status.get("Seccomp") == "2" or "seccomp" in missing
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert worker.rlimit(resource.RLIMIT_NOFILE) == (64, 64)
        assert 12 <= worker.rlimit(resource.RLIMIT_CPU)[0] <= 20
        assert reported == expected
        in_force = [measure for measure in MEASURES if measure not in missing]
        assert f"in force {', '.join(in_force)}; missing {', '.join(missing) or 'nothing'}" in caplog.text
    finally:
        preparer.close()


LACKING = """
import sys
if "services.images.decoder_process" in sys.orig_argv:
    import ctypes
    load = ctypes.CDLL
    class Kernel:
        "libc on a kernel without Landlock and seccomp, for example gVisor's"
        def __init__(self, *arguments, **options):
            self.libc = load(*arguments, **options)
        def __getattr__(self, name):
            return getattr(self.libc, name)
        def syscall(self, number, *arguments):
            if number in (444, 445, 446, 277, 317):
                ctypes.set_errno(38)
                return -1
            return self.libc.syscall(number, *arguments)
    ctypes.CDLL = Kernel
"""


async def test_kernel_that_lacks_measures_decodes_and_the_log_and_the_metric_say_so(
    decoders: Path, reported: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    (decoders / "sitecustomize.py").write_text(LACKING)
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        assert (await preparer.prepare(GOOD)).data == GOOD
        assert reported == {measure: float(measure not in ("landlock", "seccomp")) for measure in MEASURES}
        (record,) = [record for record in caplog.records if "sandbox of the image decoders" in record.message]
        assert record.levelname == "WARNING"
        assert "in force capabilities, no_new_privs, rlimits; missing landlock, seccomp" in record.message
    finally:
        preparer.close()


async def test_all_formats_are_decoded_in_the_sandbox() -> None:
    preparer = DecoderPool(make_settings(decode_workers=1), 64)
    try:
        for kind in FORMATS:
            assert (await preparer.prepare(encoded(picture(700, 500), kind))).facts.format == kind
    finally:
        preparer.close()


UNPRIVILEGED = """
import os, sys
from services.images import decoder_process, decoder_sandbox
from services.images.decode import Limits, prepare
from tests.support.pictures import FORMATS, Image, encoded, picture
files = {kind: encoded(picture(700, 500), kind) for kind in FORMATS}
Image.init()
for data in files.values():
    prepare(data, Limits(1_000_000, 64))  # loads modules that this user may be unable to read
if os.getuid() == 0:
    os.setuid(65534)
print(*decoder_sandbox.enter())
print(*(kind for kind, data in files.items() if prepare(data, Limits(1_000_000, 64)).facts.format == kind))
"""


def test_all_formats_are_decoded_by_a_user_without_rights() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [" ".join(filter(has, MEASURES)), " ".join(FORMATS)]


NEIGHBOUR = """
import ctypes, os, sys
from services.core.processes import forbid_tracing
from services.images.decoder_sandbox import _drop_capabilities
_drop_capabilities(ctypes.CDLL(None, use_errno=True))
if sys.argv[1] == "forbid":
    forbid_tracing()
if os.fork() == 0:
    try:
        print(b"SECRET=1" in open(f"/proc/{os.getppid()}/environ", "rb").read(), flush=True)
    except PermissionError:
        print("refused", flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("mode", "answer"), [("forbid", "refused"), ("allow", "True")])
def test_process_of_the_same_user_cannot_read_a_replica(mode: str, answer: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SECRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", NEIGHBOUR, mode], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == answer


@pytest.mark.filterwarnings("ignore:coroutine '.*__del__' was never awaited")  # Serve makes it async
@pytest.mark.parametrize(
    ("deployment", "arguments"),
    [(GatewayDeployment, (384, None, None)), (GuardDeployment, ()), (IntakeDeployment, (384, None))],
)
async def test_every_replica_forbids_tracing(
    deployment: Any, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Called(Exception):
        pass

    def forbid() -> None:
        raise Called

    replica = deployment.func_or_class
    module = sys.modules[replica.__module__]
    monkeypatch.setattr(module, "protect_replica", forbid)
    monkeypatch.setattr(module, "configure_logging", lambda *_: None)
    with pytest.raises(Called):
        await replica.__init__(object.__new__(replica), make_settings(), *arguments)
