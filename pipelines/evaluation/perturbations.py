"""Perturbs images as uploads often are: saved again, scaled, cropped, noisy or blurred. The content stays the same."""

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageFilter

_HIGH_QUALITY: Final = 95
"""JPEG quality for perturbations other than JPEG compression."""

Perturbation = Callable[[Image.Image, np.random.Generator], Image.Image]


def _unchanged(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    return image


def _scale(by: float) -> Perturbation:
    def apply(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        size = (max(1, round(image.width * by)), max(1, round(image.height * by)))
        return image.resize(size, Image.Resampling.LANCZOS)

    return apply


def _crop(kept: float) -> Perturbation:
    def apply(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        x, y = image.width * (1 - kept) / 2, image.height * (1 - kept) / 2
        return image.crop((round(x), round(y), max(1, round(image.width - x)), max(1, round(image.height - y))))

    return apply


def _add_noise(deviation: float) -> Perturbation:
    def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        noise = rng.normal(0, deviation, (image.height, image.width, 3))
        return Image.fromarray(np.clip(np.asarray(image, np.float64) + noise, 0, 255).astype(np.uint8))

    return apply


def _blur(share: float) -> Perturbation:
    def apply(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))

    return apply


_PERTURBATIONS: Final[dict[str, tuple[Perturbation, int]]] = {
    "saved again": (_unchanged, _HIGH_QUALITY),
    "JPEG quality 75": (_unchanged, 75),
    "JPEG quality 40": (_unchanged, 40),
    "JPEG quality 15": (_unchanged, 15),
    "half the size": (_scale(0.5), _HIGH_QUALITY),
    "a tenth cropped": (_crop(0.9), _HIGH_QUALITY),
    "noise, deviation 8": (_add_noise(8), _HIGH_QUALITY),
    "noise, deviation 20": (_add_noise(20), _HIGH_QUALITY),
    "blur, radius 1 %": (_blur(0.01), _HIGH_QUALITY),
    "blur, radius 2 %": (_blur(0.02), _HIGH_QUALITY),
}
"""Each perturbation, and the JPEG quality of the result. Noise is in 255 levels, blur in shares of the shorter side."""

PERTURBATIONS: Final = tuple(_PERTURBATIONS)


def perturb(data: bytes, seed: int) -> list[bytes]:
    """The image after each of `PERTURBATIONS`, as JPEG. The same image and seed give the same bytes.

    `data` is an image that services.images has prepared: small, and safe to decode.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    return [_save(apply(image, np.random.default_rng(seed)), quality) for apply, quality in _PERTURBATIONS.values()]


def _save(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
