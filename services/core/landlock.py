"""Landlock, a part of the Linux kernel: a process gives up rights, for itself and all that it starts, for good.

The numbers are from the kernel's header `linux/landlock.h`. Decision 16 says why this module calls the kernel itself.
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

_PR_SET_NO_NEW_PRIVS: Final = 38
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_GET_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_MAKE_BLOCK_DEVICE: Final = 1 << 11
_FILE_RIGHTS_BY_VERSION: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""By version of Landlock: how many rights of files it knows. Each is one bit, from bit 0."""
_NETWORK_RIGHTS: Final = 3
"""To bind and to connect TCP sockets, from version 4."""
_SIGNALS: Final = 2
_ABSTRACT_SOCKETS: Final = 1
"""From version 6."""


def find_version() -> int:
    """Return the version of Landlock in the kernel; 0 if there is none, or if the container forbids it."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, 0, _GET_VERSION)))


def forbid_new_privileges() -> None:
    """Let no program that this process runs get more rights than the process has. Landlock and seccomp need it.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def restrict_to_reading(folders: Iterable[str]) -> None:
    """Forbid all files but those below `folders`, which stay readable; TCP; tracing and signalling other processes.

    Call `forbid_new_privileges` first, and call this with no other thread running: it binds only the calling thread and
    what it starts later. TCP and signals are forbidden only by newer kernels (versions 4 and 6 of Landlock).

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = find_version()
    rights = (1 << _FILE_RIGHTS_BY_VERSION[min(max(version, 1), max(_FILE_RIGHTS_BY_VERSION))]) - 1
    network = _NETWORK_RIGHTS if version >= 4 else None
    scopes = _SIGNALS | _ABSTRACT_SOCKETS if version >= 6 else None
    _restrict(_pack(rights, network, scopes), folders)


def forbid_tracing_others() -> None:
    """Keep this process from the memory and the environment of processes that it does not start itself.

    It may still trace and signal its own descendants, and use all files. It cannot signal other processes either if the
    kernel has version 6 of Landlock. Call `forbid_new_privileges` first.

    Raises:
        OSError: the kernel has no Landlock.
    """
    # Landlock needs one right to forbid. No process of Sluice or of an engine makes block devices.
    scoped = find_version() >= 6
    _restrict(_pack(_MAKE_BLOCK_DEVICE, 0 if scoped else None, _SIGNALS if scoped else None), ())


def _pack(rights: int, network: int | None, scopes: int | None) -> bytes:
    """Make a `struct landlock_ruleset_attr`, as long as the kernel knows it."""
    fields = [field for field in (rights, network, scopes) if field is not None]
    return struct.pack(f"={len(fields)}Q", *fields)


def _restrict(attributes: bytes, folders: Iterable[str]) -> None:
    libc = _libc()
    ruleset = _check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                opened = os.open(folder, os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
                try:
                    rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, opened)
                    _check(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
                finally:
                    os.close(opened)
        _check(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
