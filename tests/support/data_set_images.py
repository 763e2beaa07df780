"""Small pictures for tests of data sets, each seed another one."""

import io
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def picture(seed: int, *, width: int | None = None) -> bytes:
    """A PNG of one colour."""
    draw = random.Random(seed)
    colour = tuple(draw.randrange(256) for _ in range(3))
    size = (width or draw.randint(20, 60), draw.randint(20, 60))
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar with these members."""
    with tarfile.open(file, "w") as made:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
