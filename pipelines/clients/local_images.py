"""Reads image files that a document names. A document is not trusted, and the files are sent to the service."""

import os
from pathlib import Path

from pipelines.clients.local_files import open_local_file
from services.core.errors import NotAnImage, OutsideFolder, TooLarge
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
        content = open_local_file(file, (root,))
    except OutsideFolder as error:
        raise OutsideFolder(f"{error}, and only files below it may be sent") from None
    with content:
        if (size := os.fstat(content.fileno()).st_size) > limit_bytes:
            raise TooLarge(f"the image has {size} bytes, more than {limit_bytes}")
        data = content.read(limit_bytes + 1)
    if detect_format(data) is None:
        raise NotAnImage(f"{file} is not an image of a known format, so it is not sent")
    return data
