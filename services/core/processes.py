"""Child processes: how they start, and how they and all their descendants end, even if the parent is killed.

- `SupervisedProcess` runs a command that may start processes of its own. It starts a supervisor: this module as a
  program, which leads a process group of its own and starts the command. When the parent asks for it or is gone
  (SIGKILL included), the supervisor kills every descendant, including those in another process group or session. A
  watchdog process kills the group if the supervisor itself is killed. Ray makes this necessary: it kills the children
  of a worker that exits, but not their children.
- `start_helper` runs a module of Sluice that starts no processes and ends when its connection to this process closes.
- `kill_descendants` kills every descendant of this process, and `kill_descendants_on_exit` does so after this process
  has exited. They are for processes that libraries start, such as Ray's.
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from services.core import landlock

_PARENT_CHECK_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_CHILD_SUBREAPER: Final = 36
_CAPABILITIES_TO_READ_MEMORY: Final = (19, 21, 38)
"""CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_PERFMON: the last two read `/proc/PID/environ` despite Landlock."""
_DESCENDANTS_CHECK_S: Final = 1.0
_SOURCES: Final = Path(__file__).parents[2]
_CONFINED: Final = "--confined"


class SupervisedProcess:
    """A command running in the background, with its output in a file."""

    def __init__(
        self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, confined: bool = False
    ) -> None:
        """Start the command.

        A `confined` command cannot trace or read processes outside of its own tree, also of the same user. If the
        kernel cannot forbid it, the command runs without this limit; see `can_confine`.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(os.getpid()), *([_CONFINED] if confined else []), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._supervisor.poll()

    @property
    def pid(self) -> int:
        """The process group's id."""
        return self._supervisor.pid

    def tail(self, lines: int = 20) -> str:
        """The last lines of its output."""
        with self.log.open("rb") as output:
            output.seek(max(0, self.log.stat().st_size - 64_000))
            return "\n".join(output.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self, grace_s: float = 5.0) -> None:
        """Send SIGTERM to the command, wait up to `grace_s`, then kill all descendants. A second call does nothing."""
        if self.returncode is None:
            self._supervisor.terminate()
            try:
                self._supervisor.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._supervisor.wait()

    def kill(self) -> None:
        """Kill the command and all its descendants now."""
        if self.returncode is None:
            self._supervisor.send_signal(signal.SIGUSR1)
            try:
                self._supervisor.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self._supervisor.pid, signal.SIGKILL)
        self._supervisor.wait()


def _supervise(parent: int, argv: list[str]) -> int:
    """Run `argv` until it exits, the parent is gone, or a signal asks to stop. Then kill all descendants."""
    adopt_orphans()
    watchdog = _spawn_watchdog()
    libc = ctypes.CDLL(None)
    confined = argv[0] == _CONFINED

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # it dies with the supervisor
        if confined:
            _confine()

    child = subprocess.Popen(argv[confined:], preexec_fn=prepare)  # noqa: PLW1509 - no threads in this process
    killed = False

    def kill(*_: object) -> None:
        nonlocal killed
        killed = True

    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, kill)
    while child.poll() is None and os.getppid() == parent and not killed:
        time.sleep(_PARENT_CHECK_S)
    kill_descendants(spare=watchdog)
    os.kill(watchdog, signal.SIGKILL)  # it exits by itself, unless it was suspended by SIGSTOP
    os.waitpid(watchdog, 0)
    return child.wait()


def start_helper(
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a module of Sluice as one process that ends when its connection to this process closes.

    The connection is `stdin` or one of `pass_fds`. There is no supervisor, so the module must not start processes. The
    helper has a session of its own: Ctrl-C in a terminal does not reach it. Of this process's environment it gets only
    `env` and the module search path (PYTHONPATH).
    """
    path = os.pathsep.join(dict.fromkeys([str(_SOURCES), *filter(None, sys.path)]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**env, "PYTHONPATH": path},
        pass_fds=pass_fds,
        start_new_session=True,
    )


def can_confine() -> bool:
    """Return whether the kernel keeps a confined command from the processes outside of its tree."""
    return landlock.find_version() > 0


def _confine() -> None:
    libc = ctypes.CDLL(None)
    for capability in _CAPABILITIES_TO_READ_MEMORY:  # only a process of root has them; the program then starts without
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    with contextlib.suppress(OSError):
        landlock.forbid_new_privileges()
        landlock.forbid_tracing_others()


def forbid_tracing() -> None:
    """Keep other processes of the same user from this process's memory, environment and files, and from core dumps.

    Programs that this process starts are not bound. Processes with the capability CAP_SYS_PTRACE may still do it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Make descendants children of this process when their parent ends, so that `kill_descendants` finds them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(*, spare: int | None = None, within_s: float = math.inf) -> None:
    """Kill all descendants of this process, except the process with the id `spare`.

    It repeats until none is left, because a process may fork while it is killed. It gives up after `within_s` seconds,
    because a process may hang in the kernel.
    """
    deadline = time.monotonic() + within_s
    while descendants := [each for each in psutil.Process().children(recursive=True) if _is_alive(each, spare)]:
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _is_alive(process: psutil.Process, spare: int | None) -> bool:
    try:
        return process.pid != spare and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _spawn_watchdog() -> int:
    """Fork a watchdog that kills this process's group after this process is gone. Returns its process id."""
    supervisor, gone = os.getpid(), os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        os.setsid()  # leave the group, to survive the kill below
        select.select([gone], [], [])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(supervisor, signal.SIGKILL)
        os._exit(0)
    os.close(gone)
    return pid


def find_free_port() -> int:
    """A TCP port on the loopback interface that is free now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_descendants_on_exit() -> None:
    """Start a process that kills all descendants of this process after it has exited, even by SIGKILL.

    Use it for processes that are not started by `SupervisedProcess`, such as Ray's. It checks once a second, so a
    descendant that is younger than a second may survive.
    """
    subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True
    )


def _kill_after(parent: int) -> int:
    """Record the descendants of `parent`, including those that lose their parent, and kill them after it has exited."""
    descendants: set[psutil.Process] = set()
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        exited, watched = os.pidfd_open(parent), psutil.Process(parent)
        while not select.select([exited], [], [], _DESCENDANTS_CHECK_S)[0]:
            descendants = {process for process in descendants if process.is_running()}
            descendants.update(watched.children(recursive=True))
    for process in descendants:
        if process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return 0


if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    sys.exit(_supervise(int(parent), command) if command else _kill_after(int(parent)))
