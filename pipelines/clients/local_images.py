"""Reads image files that a document names. A document is not trusted, and the files are sent to the service."""

import os
import stat
from pathlib import Path

from services.core.errors import Forbidden, NotAnImage, NotFound, TooLarge
from services.images.image_format import detect_format


def read_local_image(file: Path, root: Path, limit_bytes: int) -> bytes:
    """Return the content of an image file below `root`. Links are followed, but not out of `root`.

    Raises:
        Forbidden: the file is outside of `root`, is not a plain file, or cannot be read.
        NotFound: it does not exist.
        TooLarge: it has more than `limit_bytes`.
        NotAnImage: it does not begin like an image.
    """
    try:
        resolved = file.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise Forbidden(f"{file} is outside {root}, and only files below it may be sent")
        content = open(resolved, "rb", opener=_open_descriptor)  # noqa: SIM115 - the with statement below closes it
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {file}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise Forbidden(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    with content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Forbidden(f"{file} is not a plain file")
        if status.st_size > limit_bytes:
            raise TooLarge(f"the image has {status.st_size} bytes, more than {limit_bytes}")
        data = content.read(limit_bytes + 1)
    if detect_format(data) is None:
        raise NotAnImage(f"{file} is not an image of a known format, so it is not sent")
    return data


def _open_descriptor(path: str, flags: int) -> int:
    """Open without following a link, and without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
