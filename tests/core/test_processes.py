"""Child processes end with their parent, even if the parent is killed."""

import ast
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.core.processes import SupervisedProcess, can_confine, start_helper
from tests.support.kernel import landlock_version, skip_without
from tests.support.processes import are_gone

# A parent, a child, and a grandchild in a session of its own: each writes its pid.
FAMILY = """
import os, subprocess, sys, time
open({pids!r}, "a").write(f"{{os.getpid()}}\\n")
subprocess.Popen(
    [sys.executable, "-c", "import os, time; open({pids!r}, 'a').write(f'{{os.getpid()}}\\\\n'); time.sleep(600)"],
    start_new_session=True,
)
time.sleep(600)
"""


def pids_in(file: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if file.exists() and len(pids := file.read_text().split()) == count:
            return [int(pid) for pid in pids]
        time.sleep(0.05)
    raise AssertionError(f"{file} never had {count} pids")


def await_recording(parent: int) -> None:
    """Wait until the process of `kill_descendants_on_exit` has recorded the present descendants of `parent`.

    It holds a pidfd while it records, and each round of its loop is at least one voluntary context switch.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        command = ["services.core.processes", str(parent)]
        recorders = [each for each in psutil.Process(parent).children() if each.cmdline()[-2:] == command]
        if recorders and "anon_inode:[pidfd]" in links_of(recorders[0].pid):
            break
        time.sleep(0.05)
    switches = recorders[0].num_ctx_switches().voluntary
    while recorders[0].num_ctx_switches().voluntary < switches + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def links_of(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def start_parent(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])


@pytest.fixture
def family(tmp_path: Path) -> tuple[str, Path]:
    pids = tmp_path / "pids"
    return FAMILY.format(pids=str(pids)), pids


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_supervised_process_stopped_kills_descendants(family: tuple[str, Path], tmp_path: Path, end: str) -> None:
    script, file = family
    child = SupervisedProcess([sys.executable, "-c", script], log=tmp_path / "log")
    pids = pids_in(file, 2)
    getattr(child, end)()
    assert are_gone(pids)
    assert child.returncode is not None


def test_kill_suspended_watchdog_is_killed_too(family: tuple[str, Path], tmp_path: Path) -> None:
    script, file = family
    child = SupervisedProcess([sys.executable, "-c", script], log=tmp_path / "log")
    pids = pids_in(file, 2)
    everyone = psutil.Process(child.pid).children(recursive=True)
    (watchdog,) = [process for process in everyone if process.pid not in pids]
    watchdog.suspend()
    child.kill()
    assert are_gone([*pids, watchdog.pid])


def test_supervised_process_parent_killed_descendants_end(family: tuple[str, Path], tmp_path: Path) -> None:
    script, file = family
    parent = start_parent(
        "import sys, time; from pathlib import Path; from services.core.processes import SupervisedProcess;"
        f"SupervisedProcess([sys.executable, '-c', {script!r}], log=Path({str(tmp_path / 'log')!r}));"
        "time.sleep(600)"
    )
    pids = pids_in(file, 2)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert are_gone(pids)


def test_supervised_process_supervisor_killed_group_ends(family: tuple[str, Path], tmp_path: Path) -> None:
    """Ray kills the children of a worker in this way. Descendants outside the group cannot be reached then."""
    script, file = family
    child = SupervisedProcess(
        [sys.executable, "-c", script.replace("start_new_session=True", "start_new_session=False")],
        log=tmp_path / "log",
    )
    pids = pids_in(file, 2)
    os.kill(child.pid, signal.SIGKILL)
    assert are_gone(pids)


def test_kill_suspended_supervisor_is_killed_too(family: tuple[str, Path], tmp_path: Path) -> None:
    script, file = family
    child = SupervisedProcess([sys.executable, "-c", script], log=tmp_path / "log")
    pids = pids_in(file, 2)
    os.kill(child.pid, signal.SIGSTOP)
    child.kill()
    assert are_gone([child.pid, pids[0]])


def test_supervised_process_exit_reports_status_and_last_lines(tmp_path: Path) -> None:
    child = SupervisedProcess(
        [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"], log=tmp_path / "log"
    )
    deadline = time.monotonic() + 10
    while child.returncode is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.returncode == 3
    assert child.tail(1) == "two"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_kill_descendants_on_exit_process_ends_kills_orphans_too(family: tuple[str, Path], end: signal.Signals) -> None:
    """The grandchild, whose own parent was killed before, is killed as well."""
    script, file = family
    parent = start_parent(
        "import subprocess, sys, time; from services.core.processes import kill_descendants_on_exit;"
        f"kill_descendants_on_exit(); subprocess.Popen([sys.executable, '-c', {script!r}], start_new_session=True);"
        "time.sleep(600)"
    )
    pids = pids_in(file, 2)
    await_recording(parent.pid)
    os.kill(pids[0], signal.SIGKILL)
    assert are_gone(pids[:1])
    assert psutil.pid_exists(pids[1])
    parent.send_signal(end)
    parent.wait()
    assert are_gone(pids)


CURIOUS = """
import os, signal, subprocess, sys, time
victim = int(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def attempt(name, action):
    try:
        action()
        print(name, "succeeded", flush=True)
    except OSError as error:
        print(name, "refused", error.errno, flush=True)

attempt("environ", lambda: open(f"/proc/{victim}/environ", "rb").read())
attempt("memory", lambda: open(f"/proc/{victim}/mem", "r+b"))
attempt("files", lambda: os.listdir(f"/proc/{victim}/fd") and os.stat(f"/proc/{victim}/fd/0"))
attempt("signal", lambda: os.kill(victim, 0))
attempt("own child", lambda: open(f"/proc/{child.pid}/environ", "rb").read())
attempt("own signal", lambda: child.kill())
"""


@pytest.mark.parametrize("confined", [True, False])
def test_confined_command_cannot_reach_processes_of_its_user(tmp_path: Path, confined: bool) -> None:
    skip_without("landlock")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"SECRET": "hush"})
    child = SupervisedProcess([sys.executable, "-c", CURIOUS, str(victim.pid)], log=tmp_path / "log", confined=confined)
    try:
        assert child._supervisor.wait(60) == 0, child.tail()
        results = dict(line.split(" ", 1) for line in child.tail().replace("own ", "own-").splitlines())
    finally:
        child.kill()
        victim.kill()
        victim.wait()
    assert results.pop("own-child") == results.pop("own-signal") == "succeeded"
    if landlock_version() < 6:
        assert results.pop("signal") == "succeeded"
    assert set(results.values()) <= ({"refused 1", "refused 13"} if confined else {"succeeded"}), results


def test_kernel_without_landlock_runs_confined_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from services.core import landlock; landlock._CREATE_RULESET = 100_000  # no such system call"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path), os.getcwd()]))
    child = SupervisedProcess([sys.executable, "-c", "print('runs')"], log=tmp_path / "log", confined=True)
    assert child._supervisor.wait(60) == 0
    assert "runs" in child.tail()
    monkeypatch.setattr("services.core.landlock._CREATE_RULESET", 100_000)
    assert not can_confine()


def test_kill_descendants_with_spare_kills_all_others() -> None:
    """The descendant whose parent has ended is found, because the killing process is its subreaper."""
    program = (
        "import subprocess\n"
        "from services.core.processes import adopt_orphans, kill_descendants\n"
        "adopt_orphans()\n"
        "spared = subprocess.Popen(['sleep', '600'])\n"
        "subprocess.run(['sh', '-c', 'setsid sleep 600 & setsid sleep 600 &'])\n"
        "import psutil\n"
        "others = [p for p in psutil.Process().children(recursive=True) if p.pid != spared.pid]\n"
        "assert len(others) == 2, others\n"
        "kill_descendants(spare=spared.pid, within_s=5)\n"
        "alive = [p for p in others if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]\n"
        "print(len(alive), spared.poll())\n"
        "spared.kill()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["0", "None"]


def test_start_helper_gets_given_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "environment"
    (tmp_path / "helper_of_test.py").write_text(f"import os; open({str(file)!r}, 'w').write(str(dict(os.environ)))")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert start_helper("helper_of_test", env={"SETTING": "value"}).wait(20) == 0
    environment = ast.literal_eval(file.read_text())
    assert environment["SETTING"] == "value"
    assert "AWS_SECRET_ACCESS_KEY" not in environment
