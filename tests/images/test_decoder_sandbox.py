"""Attacks of a decoder that runs an attacker's code. Each tries what its sandbox forbids."""

import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.serving.gateway_deployment import GatewayDeployment
from pipelines.serving.guard_deployment import GuardDeployment
from pipelines.serving.intake_deployment import IntakeDeployment
from services.core import telemetry
from services.core.errors import NotAnImage
from services.images import decoder_sandbox, thread_watch
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
        # files of the user: Landlock does not know these rights
        "os.chmod(__import__('sitecustomize').__file__, 0o666)",
        "os.chmod(0, 0o666)",
        "os.chown(__import__('sitecustomize').__file__, os.getuid(), os.getgid())",
        "os.lchown(__import__('sitecustomize').__file__, os.getuid(), os.getgid())",
        "os.utime(__import__('sitecustomize').__file__, (0, 0))",
        "os.setxattr(__import__('sitecustomize').__file__, 'user.x', b'1')",
        "os.getxattr(__import__('sitecustomize').__file__, 'user.x')",
        "os.removexattr(__import__('sitecustomize').__file__, 'user.x')",
        "os.truncate(__import__('sitecustomize').__file__, 0)",
        "os.unlink(__import__('sitecustomize').__file__)",
        "os.rename(__import__('sitecustomize').__file__, __import__('sitecustomize').__file__ + '.old')",
        "os.mkdir(__import__('sitecustomize').__file__ + '.folder')",
        "os.open(__import__('sitecustomize').__file__, os.O_RDONLY | os.O_TRUNC)",
        "__import__('io').open('/tmp/sluice-written-by-a-decoder', 'w')",
        "__import__('io').open(f'/proc/{os.getppid()}/mem', 'r+b').read()",
        "__import__('fcntl').flock(os.open(os.__file__, os.O_RDONLY), __import__('fcntl').LOCK_EX)",
        # priorities and processors; here its own, as the kernel itself protects a parent with capabilities
        "os.setpriority(os.PRIO_PROCESS, 0, 19)",
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
        "os.sched_setparam(0, os.sched_param(0))",
        "os.sched_setaffinity(0, {0})",
        # signals when bytes arrive: F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP, F_NOTIFY
        "__import__('fcntl').fcntl(0, 8, os.getppid())",
        "__import__('fcntl').fcntl(0, 10, signal.SIGKILL)",
        "__import__('fcntl').fcntl(0, 15, __import__('struct').pack('ii', 1, os.getppid()))",
        "__import__('fcntl').ioctl(0, 0x8901, __import__('struct').pack('i', os.getppid()))",
        "__import__('fcntl').ioctl(0, 0x8902, __import__('struct').pack('i', os.getppid()))",
        "__import__('fcntl').fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY), 1026, 0x3F)",
    ],
    "landlock": [
        "__import__('io').open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "__import__('io').open(f'/proc/{os.getppid()}/mem', 'rb').read()",
        "__import__('io').open('/etc/passwd').read()",
        "__import__('io').open('/proc/self/environ').read()",
        "os.listdir('/')",
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
    [
        ("ptrace", "101, 16, os.getppid(), 0, 0"),
        ("connect", "42, 0, 0, 0"),
        ("x32 getpid", "0x40000000 + 39, 0"),
        ("fchmodat2", "452, -100, sys.modules['sitecustomize'].__file__.encode(), 0o666, 0"),
        ("openat2", "437, -100, b'/tmp', bytes(24), 24"),
        ("inotify_init1", "294, 0"),
        ("fanotify_init", "300, 0, 0"),
        ("msgget", "68, 0, 0o1600"),
        ("semget", "64, 0, 1, 0o1600"),
        ("mq_open", "240, b'sluice-opened-by-a-decoder', 0o102, 0o600, 0"),
        ("ioprio_set", "251, 1, 0, 3 << 13"),
        ("sched_setattr", "314, 0, (48).to_bytes(4, 'little') + bytes(44), 0"),
        ("migrate_pages", "256, 0, 64, bytes(8), bytes(8)"),
        ("move_pages", "279, 0, 0, 0, 0, 0, 0"),
        ("io_setup", "206, 1, bytes(8)"),
        ("fcntl with bits that the kernel ignores", "72, 0, ctypes.c_ulong(1 << 32 | 8), os.getppid()"),
    ],
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


HEADERS = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))


@pytest.mark.parametrize(("column", "header"), list(enumerate(HEADERS)), ids=["x86_64", "aarch64"])
def test_numbers_of_calls_are_those_of_the_kernel(column: int, header: Path) -> None:
    """64-bit ARM uses the generic table."""
    if not header.exists():
        pytest.skip(f"the kernel's header {header} is not installed")
    lines = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text(), re.MULTILINE)
    kernel = {name: int(number) for name, number in lines}
    known = decoder_sandbox._DENIED | decoder_sandbox._OWN_PROCESS_ONLY | decoder_sandbox._OWN_LIMITS_ONLY
    known |= {"fcntl": decoder_sandbox._FCNTL, "ioctl": decoder_sandbox._IOCTL, "clone": decoder_sandbox._CLONE}
    known |= {name: numbers[:2] for name, numbers in decoder_sandbox._OPEN.items()}
    assert len(known) > 100
    assert {name: numbers[column] for name, numbers in known.items()} == {name: kernel.get(name) for name in known}


WITHOUT_LANDLOCK = """
import sys
if "services.images.decoder_process" in sys.orig_argv:
    from services.core import landlock
    landlock._CREATE_RULESET = 9999  # no kernel has this call
"""


THREADS = (
    "import _thread; _thread.stack_size(32768); [_thread.start_new_thread(time.sleep, (60,)) for _ in range(2000)]; "
)


async def test_decoder_that_starts_threads_without_end_is_killed_and_replaced(
    decoders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    misbehave(decoders, THREADS + "time.sleep(60)")
    preparer = DecoderPool(make_settings(decode_workers=1, decode_deadline_s=50), 512)
    try:
        with pytest.raises(NotAnImage, match="crashed 2 times"):
            await preparer.prepare(BAD)
        assert (await preparer.prepare(GOOD)).data == GOOD
        assert caplog.text.count("threads; the limit is 16; it was killed") == 2
    finally:
        preparer.close()


async def test_decoder_that_starts_threads_after_its_answer_is_killed(
    decoders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = f"_thread.start_new_thread(lambda: (time.sleep(0.3), exec({THREADS!r}, {{'time': time}})), ())"
    misbehave(decoders, f"import _thread; {start}")
    preparer = DecoderPool(make_settings(decode_workers=1, decode_deadline_s=50), 512)
    try:
        await preparer.prepare(BAD)
        (worker,) = workers_of(os.getpid())
        psutil.wait_procs([worker], timeout=20)
        assert (await preparer.prepare(GOOD)).data == GOOD
        assert "threads; the limit is 16; it was killed" in caplog.text
    finally:
        preparer.close()


async def test_no_format_needs_half_of_the_allowed_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    most, count = 0, thread_watch.count_threads

    def note(pid: int) -> int:
        nonlocal most
        threads = count(pid)
        most = max(most, threads)
        return threads

    monkeypatch.setattr(thread_watch, "count_threads", note)
    monkeypatch.setattr(thread_watch, "_INTERVAL_S", 0.001)
    preparer = DecoderPool(make_settings(decode_workers=1), 64)
    try:
        for kind in FORMATS:
            await preparer.prepare(encoded(picture(3000, 2000), kind))
    finally:
        preparer.close()
    assert 2 <= most <= thread_watch.THREADS_LIMIT // 2


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


async def test_decoder_without_landlock_kills_no_process_by_a_signal_for_arriving_bytes(
    decoders: Path, victim: subprocess.Popen[bytes]
) -> None:
    skip_without("seccomp")
    steps = (
        f"(lambda f: (os.open('/etc/passwd', os.O_RDONLY), f.fcntl(0, f.F_SETOWN, {victim.pid}), "
        "f.fcntl(0, 10, signal.SIGKILL), f.fcntl(0, f.F_SETFL, f.fcntl(0, f.F_GETFL) | os.O_ASYNC)))"
        "(__import__('fcntl'))"
    )
    misbehave(decoders, refusal(steps))
    program = decoders / "sitecustomize.py"
    program.write_text(WITHOUT_LANDLOCK + program.read_text())
    preparer = DecoderPool(make_settings(decode_workers=1), 512)
    try:
        with pytest.raises(NotAnImage, match=r"refused 1$"):  # 13 would be Landlock's refusal of the file
            await preparer.prepare(BAD)
        assert (await preparer.prepare(GOOD)).data == GOOD
        assert victim.poll() is None
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
