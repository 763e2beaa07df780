"""Opens files in folders that are not trusted: a data set of somebody else, or the files that a document names."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from services.core.errors import Forbidden, NotFound, OutsideFolder


def open_local_file(file: Path, roots: Sequence[Path]) -> BinaryIO:
    """Open a plain file below one of `roots`. Links are followed, but not out of all roots.

    A pipe or a device is refused, because reading it could block forever. A hard link is a plain file of its folder.

    Raises:
        OutsideFolder: the file is outside of all roots.
        Forbidden: it is not a plain file, or it cannot be read.
        NotFound: it does not exist.
    """
    try:
        resolved, folders = file.resolve(), [root.resolve() for root in roots]
        if not any(map(resolved.is_relative_to, folders)):
            raise _make_error(file, resolved, roots)
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        # Somebody may have replaced a folder above the file by a link meanwhile.
        opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not any(map(opened.is_relative_to, folders)):
            os.close(descriptor)
            raise _make_error(file, opened, roots)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {file}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise Forbidden(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Forbidden(f"{file} is not a plain file")
    return open(descriptor, "rb")


def _make_error(file: Path, resolved: Path, roots: Sequence[Path]) -> OutsideFolder:
    link = f" is a link to {resolved}, which" if resolved != file else ""
    return OutsideFolder(f"{file}{link} is outside {' and '.join(map(str, roots)) or 'every allowed folder'}")


def is_below(file: Path, roots: Sequence[Path]) -> bool:
    """Whether a file, with its links resolved, is below one of `roots`."""
    try:
        resolved = file.resolve()
        return any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError):
        return False
