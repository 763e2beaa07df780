"""What a decoder process gives up before it reads hostile bytes: a taken decoder must not reach anything else.

| Measure | Effect |
|---|---|
| `capabilities` | a process of root has no more rights than its user id |
| `no_new_privs` | no program that it might run gets more rights |
| `landlock` | it opens no file but Python's own code, read-only; it traces and signals no other process; no TCP |
| `seccomp` | no sockets, no programs, no processes, no tracing, no reading of other processes' memory |
| `rlimits` | few open files, no files written, no core dump |

A kernel or a container may lack any of them, so `enter` returns those that are in force. This module calls the kernel
through libc; the numbers are from the kernel's headers `linux/seccomp.h`, `linux/filter.h` and `asm/unistd.h`. Decision
16 compares the libraries that could be used instead.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.core import landlock

MEASURES: Final = ("capabilities", "no_new_privs", "landlock", "seccomp", "rlimits")

_SOURCES: Final = Path(__file__).parents[1]
_OPEN_FILES_LIMIT: Final = 64

_CAPABILITY_VERSION_3: Final = 0x20080522

_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_ALLOW: Final = 0x7FFF0000
_DENY: Final = 0x00050000 | 1  # EPERM
_UNKNOWN: Final = 0x00050000 | 38  # ENOSYS: libc then uses an older call
_KILL: Final = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD: Final = 0x00010000
_FIRST_NEW_CALL: Final = 435
"""From clone3 on, the numbers are the same on all architectures, and libc can do without these calls."""
_X86_AUDIT, _ARM_AUDIT = 0xC000003E, 0xC00000B7
_DENIED: Final = {
    # sockets
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "recvmsg": (47, 212),
    "recvmmsg": (299, 243),
    # programs and processes
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # parts of the kernel that no decoder needs, and that had holes
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "personality": (135, 92),
}
"""Calls that fail with EPERM, with their numbers on x86-64 and on 64-bit ARM."""
_OWN_PROCESS_ONLY: Final = {"kill": (62, 129), "tgkill": (234, 131)}
_OWN_LIMITS_ONLY: Final = {"prlimit64": (302, 261)}
_CLONE: Final = (56, 220)


def enter() -> list[str]:
    """Put all measures that the kernel allows in force, for good. Returns the names of those that are.

    Call it with no other thread running: Landlock binds only the calling thread and what it starts later.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    measures: dict[str, Callable[[], None]] = {
        "capabilities": lambda: _drop_capabilities(libc),
        "no_new_privs": landlock.forbid_new_privileges,
        "landlock": lambda: landlock.restrict_to_reading(_code_folders()),
        "seccomp": lambda: _restrict_calls(libc),
    }
    in_force = []
    for name, apply in measures.items():
        with suppress(OSError):
            apply()
            in_force.append(name)
    with suppress(OSError, ValueError):
        _set_limits()
        in_force.append("rlimits")
    return in_force


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, bytes(24)))


def _code_folders() -> Iterable[str]:
    """Folders of Python, of its packages, of system libraries and of this package: decoders are loaded late."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = [sysconfig.get_path(name, vars=variables) for variables in (None, bases) for name in names]
    return dict.fromkeys([*paths, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", str(_SOURCES)])


def _restrict_calls(libc: ctypes.CDLL) -> None:
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        raise OSError(f"the numbers of system calls on {machine} are not known")
    program = _build_filter(arm=machine == "aarch64", pid=os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions and their address
    description = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    number = 277 if machine == "aarch64" else 317
    _check(libc.syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, description))


def _build_filter(*, arm: bool, pid: int) -> bytes:
    """The program of classic BPF that decides on each system call."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARM_AUDIT if arm else _X86_AUDIT),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL_AT),
        (_AT_LEAST, 0, 1, _FIRST_NEW_CALL),  # also all calls of x32, which have bit 30
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    for numbers in _DENIED.values():
        number = numbers[arm]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    for calls, value in ((_OWN_PROCESS_ONLY, pid), (_OWN_LIMITS_ONLY, 0)):
        for numbers in calls.values():
            code += [
                (_EQUAL, 0, 4, numbers[arm]),
                (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
                (_EQUAL, 0, 1, value),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _DENY),
            ]
    code += [
        (_EQUAL, 0, 4, _CLONE[arm]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _set_limits() -> None:
    # No RLIMIT_NPROC: the decoder of HEIC starts threads, which it would count with all threads of the user. seccomp
    # forbids processes, and the limit of the address space bounds the number of threads.
    for limit, value in (
        (resource.RLIMIT_NOFILE, _OPEN_FILES_LIMIT),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),  # a core dump would contain the image
    ):
        resource.setrlimit(limit, (value, value))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
