"""What happens to images on their way: saved again, scaled, cropped, noisy, blurred. Nobody sees another image."""

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageFilter

_SAVED: Final = 95
"""JPEG quality of what is not about JPEG."""

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _same(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    return image


def _scaled(by: float) -> Change:
    def change(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        size = (max(1, round(image.width * by)), max(1, round(image.height * by)))
        return image.resize(size, Image.Resampling.LANCZOS)

    return change


def _cropped(kept: float) -> Change:
    def change(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        x, y = image.width * (1 - kept) / 2, image.height * (1 - kept) / 2
        return image.crop((round(x), round(y), max(1, round(image.width - x)), max(1, round(image.height - y))))

    return change


def _noisy(deviation: float) -> Change:
    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        noise = rng.normal(0, deviation, (image.height, image.width, 3))
        return Image.fromarray(np.clip(np.asarray(image, np.float64) + noise, 0, 255).astype(np.uint8))

    return change


def _blurred(share: float) -> Change:
    def change(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))

    return change


_CHANGES: Final[dict[str, tuple[Change, int]]] = {
    "saved again": (_same, _SAVED),
    "JPEG quality 75": (_same, 75),
    "JPEG quality 40": (_same, 40),
    "JPEG quality 15": (_same, 15),
    "half the size": (_scaled(0.5), _SAVED),
    "a tenth cropped": (_cropped(0.9), _SAVED),
    "noise, deviation 8": (_noisy(8), _SAVED),
    "noise, deviation 20": (_noisy(20), _SAVED),
    "blur, radius 1 %": (_blurred(0.01), _SAVED),
    "blur, radius 2 %": (_blurred(0.02), _SAVED),
}
"""What is done, and the JPEG quality that the result is saved with. Of 255 levels; of the shorter side."""

PERTURBATIONS: Final = tuple(_CHANGES)


def perturbed(data: bytes, seed: int) -> list[bytes]:
    """An image after each of `PERTURBATIONS`, as JPEG. The same image and seed give the same bytes.

    `data` comes out of services.images, so it is a small RGB image that can be decoded.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    return [_saved(change(image, np.random.default_rng(seed)), quality) for change, quality in _CHANGES.values()]


def _saved(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
