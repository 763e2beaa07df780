"""What a decoder process gives up before it reads hostile bytes: a taken decoder must not reach anything else.

| Measure | Effect |
|---|---|
| `capabilities` | a process of root has no more rights than its user id |
| `no_new_privs` | no program that it might run gets more rights |
| `landlock` | it opens no file but Python's own code, read-only; it traces no other process; no TCP |
| `seccomp` | no sockets, programs, processes, tracing; no memory, signals or priority of others; it changes no files |
| `rlimits` | few open files, no files written, no core dump |

seccomp also refuses to open files for writing, to change their modes, owners, times, names and attributes, to watch
them, and queues, semaphores and memory that processes share. Landlock refuses TCP from Linux 6.7 on, and signals to
other processes from 6.12 on; seccomp refuses both on all kernels. Neither refuses `stat` and `readlink`: a taken
decoder can ask whether a path that it guesses exists, and for size, times, mode and owner of the file.

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
from collections.abc import Callable, Iterable, Sequence
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
_CALL_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT, _ARGUMENT_BYTES = 0, 4, 16, 8
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
    # files: Landlock does not know modes, owners, times and attributes, and old ones do not know `truncate`
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # memory, queues and semaphores that processes share
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    # priorities, processors and memory of other processes; no decoder changes its own
    "setpriority": (141, 140),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "ioprio_set": (251, 30),
    "mbind": (237, 235),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "get_robust_list": (274, 100),
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
    "personality": (135, 92),
    "syslog": (103, 116),
    "io_setup": (206, 0),
    "io_submit": (209, 2),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
}
"""Calls that fail with EPERM, with their numbers on x86-64 and on 64-bit ARM."""
_OWN_PROCESS_ONLY: Final = {"kill": (62, 129), "tgkill": (234, 131)}
_OWN_LIMITS_ONLY: Final = {"prlimit64": (302, 261)}
_FCNTL: Final = (72, 25)
_FCNTL_COMMANDS: Final = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not F_SETOWN and F_SETSIG: they send signals."""
_IOCTL: Final = (16, 29)
_IOCTL_COMMANDS: Final = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS (`isatty`), FIONREAD, FIONBIO (time limits of sockets), FIONCLEX, FIOCLEX. Not FIOSETOWN and SIOCSPGRP."""
_OPEN: Final = {"open": (2, None, 1), "openat": (257, 56, 2)}
"""The numbers on x86-64 and on ARM, and which argument has the flags."""
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
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
            code += _allow_values(numbers[arm], 0, (value,))
    code += _allow_values(_FCNTL[arm], 1, _FCNTL_COMMANDS)
    code += _allow_values(_IOCTL[arm], 1, _IOCTL_COMMANDS)
    for on_x86, on_arm, flags_at in _OPEN.values():
        opening = on_arm if arm else on_x86
        if opening is not None:
            code += _decide_by_bits(opening, flags_at, _WRITING, if_any=_DENY, if_none=_ALLOW)
    code += _decide_by_bits(_CLONE[arm], 0, _CLONE_THREAD, if_any=_ALLOW, if_none=_DENY)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _allow_values(number: int, argument: int, values: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Allow a call only with these values in the lower 32 bits of an argument: the kernel ignores the others."""
    code = [(_EQUAL, 0, 2 * len(values) + 2, number), (_LOAD, 0, 0, _ARGUMENTS_AT + _ARGUMENT_BYTES * argument)]
    for value in values:
        code += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*code, (_RETURN, 0, 0, _DENY)]


def _decide_by_bits(
    number: int, argument: int, bits: int, *, if_any: int, if_none: int
) -> list[tuple[int, int, int, int]]:
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENTS_AT + _ARGUMENT_BYTES * argument),
        (_ANY_BIT, 0, 1, bits),
        (_RETURN, 0, 0, if_any),
        (_RETURN, 0, 0, if_none),
    ]


def _set_limits() -> None:
    # No RLIMIT_NPROC: the decoder of HEIC starts threads, which it would count with all threads of the user. seccomp
    # forbids processes, and the parent kills a decoder with many threads (services/images/thread_watch.py).
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
