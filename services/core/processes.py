"""Child processes that never outlive their parent, however it ends.

`Child` starts a *guardian*: this module as a program, leader of a process group of its own, which starts the real
command. When the parent is gone (SIGKILL included) or asks for it, the guardian kills every descendant, also those
that moved to another group or session. A second process stands by to kill the group when the guardian itself is killed:
Ray kills the children of a worker that ends, and would leave theirs behind.
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

_PARENT_CHECK_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_FAMILY_CHECK_S: Final = 1.0


class Child:
    """A command running in the background, with its output in a file."""

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = tuple(argv)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._guardian = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._guardian.poll()

    @property
    def pid(self) -> int:
        """The process group's id."""
        return self._guardian.pid

    def tail(self, lines: int = 20) -> str:
        """The last lines of its output."""
        with self.log.open("rb") as output:
            output.seek(max(0, self.log.stat().st_size - 64_000))
            return "\n".join(output.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM the command, wait up to `grace_s`, then kill whatever is left. Does nothing the second time."""
        if self.returncode is None:
            self._guardian.terminate()
            try:
                self._guardian.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._guardian.wait()

    def kill(self) -> None:
        """Kill the command and all its descendants now."""
        if self.returncode is None:
            self._guardian.send_signal(signal.SIGUSR1)
            try:
                self._guardian.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self._guardian.pid, signal.SIGKILL)
        self._guardian.wait()


def _guard(parent: int, argv: list[str]) -> int:
    """Run `argv` until it ends, the parent is gone, or a signal asks for its end; leave no descendant behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    standby = _stand_by()

    def die_with_guardian() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    child = subprocess.Popen(argv, preexec_fn=die_with_guardian)  # noqa: PLW1509 - no threads in this process
    killed = False

    def kill(*_: object) -> None:
        nonlocal killed
        killed = True

    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, kill)
    while child.poll() is None and os.getppid() == parent and not killed:
        time.sleep(_PARENT_CHECK_S)
    kill_descendants(spare=standby)
    os.kill(standby, signal.SIGKILL)  # it would end by itself, unless someone has stopped it
    os.waitpid(standby, 0)
    return child.wait()


def kill_descendants(*, spare: int | None = None, within_s: float = math.inf) -> None:
    """Kill all descendants of this process, except the process with the id `spare`.

    It repeats until none is left, because a process may fork while it is killed. It gives up after `within_s` seconds,
    because a process may hang in the kernel.
    """
    deadline = time.monotonic() + within_s
    while descendants := [each for each in psutil.Process().children(recursive=True) if _lives(each, spare)]:
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _lives(process: psutil.Process, standby: int | None) -> bool:
    try:
        return process.pid != standby and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _stand_by() -> int:
    """Fork the process that kills this one's group once this one is gone."""
    guardian, gone = os.getpid(), os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        os.setsid()  # not in the group that it is going to kill
        select.select([gone], [], [])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guardian, signal.SIGKILL)
        os._exit(0)
    os.close(gone)
    return pid


def free_port() -> int:
    """A TCP port on the loopback interface that is free now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_with_this_process() -> None:
    """See to it that the descendants of this process end when it does, even by SIGKILL.

    For what is not started as a `Child`, such as Ray. Another process watches the family and waits for the moment.
    Descendants are known to it a second after they were started.
    """
    subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True
    )


def _outlive(parent: int) -> int:
    """Remember the descendants of `parent`, whoever their parents become, and kill what is left of them after it."""
    family: set[psutil.Process] = set()
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        ended, watched = os.pidfd_open(parent), psutil.Process(parent)
        while not select.select([ended], [], [], _FAMILY_CHECK_S)[0]:
            family = {process for process in family if process.is_running()}
            family.update(watched.children(recursive=True))
    for process in family:
        if process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(_guard(int(given[0]), given[1:]) if given[1:] else _outlive(int(given[0])))
