"""Opens files in folders that are not trusted: a data set of somebody else, or the files that a document names."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from services.core.errors import Forbidden, NotFound, OutsideFolder


def open_local_file(file: Path, roots: Sequence[Path]) -> BinaryIO:
    """Open a plain file below one of `roots`. Links are followed, but not out of all roots.

    A pipe or a device is refused, because reading it could block forever.

    Raises:
        OutsideFolder: the file is outside of all roots.
        Forbidden: it is not a plain file, or it cannot be read.
        NotFound: it does not exist.
    """
    try:
        resolved = file.resolve()
        if not any(resolved.is_relative_to(root.resolve()) for root in roots):
            link = f" is a link to {resolved}, which" if resolved != file else ""
            raise OutsideFolder(f"{file}{link} is outside {' and '.join(map(str, roots)) or 'every allowed folder'}")
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {file}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise Forbidden(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Forbidden(f"{file} is not a plain file")
    return open(descriptor, "rb")


def is_below(file: Path, roots: Sequence[Path]) -> bool:
    """Whether a file, with its links resolved, is below one of `roots`."""
    try:
        resolved = file.resolve()
        return any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError):
        return False
