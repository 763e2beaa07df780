"""Distinct JPEGs for measuring speed: no two share pixels, so that no engine finds one in its cache.

python benchmarks/made_up_images.py 1920x1080 COUNT FOLDER
"""

import io
import os
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

_GRAIN_PX = 24
"""The size of a patch of colour. A JPEG gets about the size of a photograph's."""


def draw_picture(number: int, width: int, height: int) -> bytes:
    """Soft patches of colour with noise, another picture for each number."""
    draw_from = np.random.default_rng(number)
    patches = draw_from.integers(0, 256, (height // _GRAIN_PX + 2, width // _GRAIN_PX + 2, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = draw_from.integers(-8, 9, (height, width, 1), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _write(number: int, width: int, height: int, folder: Path) -> None:
    (folder / f"{number:05}.jpg").write_bytes(draw_picture(number, width, height))


if __name__ == "__main__":
    size, count, target = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    wide, high = (int(side) for side in size.split("x"))
    target.mkdir(parents=True, exist_ok=True)
    with Pool(os.cpu_count()) as pool:
        pool.map(partial(_write, width=wide, height=high, folder=target), range(count), chunksize=8)
