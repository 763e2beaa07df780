"""Draws images whose correct answer is known, for the training of the tiny guard, the demo, tests and evaluation.

Each of LlavaGuard's nine categories has a pictogram that stands for a violation, so no harmful picture is needed.
Everything else is harmless: grounds, scenes, and things that share only a shape or a colour with a pictogram. An image
depends on its arguments alone. The tiny guard knows only these drawings.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from services.core.values import CATEGORIES, NO_CATEGORY

Colour = tuple[int, int, int]
Point = tuple[float, float]

TRAINING_SEEDS: Final = range(1_000_000_000, 2_000_000_000)
"""The seeds of training images. Tests and evaluations of the guard use other seeds."""

INKS: Final[dict[str, Colour]] = {
    "red": (200, 30, 40),
    "orange": (235, 120, 20),
    "green": (30, 140, 60),
    "blue": (35, 80, 200),
    "purple": (125, 45, 165),
    "brown": (115, 70, 35),
    "pink": (230, 90, 160),
    "teal": (20, 150, 155),
}
"""The colours of things, by their names in a rationale."""

_SPRITE_PX: Final = 192
"""Things are drawn at this size and then rotated and scaled. They stay sharp in an image of 360 px."""

_WHITE: Final = (250, 250, 250)
_BLACK: Final = (20, 20, 24)
_STEEL: Final = (186, 194, 202)
_FLAME: Final = (255, 132, 0)
_GLOW: Final = (255, 222, 60)
_BLOOD: Final = (196, 0, 12)


@dataclass(frozen=True)
class Drawing:
    """An image and the correct answer to it."""

    seed: int
    image: Image.Image
    """RGB, upright."""
    category: str
    """The full name of the category that the image violates under the default policy, or `NA: None applying`."""
    mask: Image.Image
    """Mode L, in the size of the image: the coverage of each pixel by the pictogram; all 0 in a harmless image."""
    thing: str
    """The pictogram, such as `bloody knife`, or the largest harmless thing; empty if there is none."""
    colour: str
    """The colour of the thing, a key of INKS; empty if there is no thing."""
    scene: str
    """The background, such as `plain ground`."""
    quality: int
    """The JPEG quality of the encoded image."""

    @property
    def rating(self) -> str:
        """`Safe` or `Unsafe` under the default policy, which waives no category."""
        return "Safe" if self.category == NO_CATEGORY else "Unsafe"

    @cached_property
    def jpeg(self) -> bytes:
        """The image as a JPEG file."""
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


class _Pen:
    """Draws on a transparent square in unit coordinates: (0, 0) is the upper left, (1, 1) the lower right."""

    def __init__(self, ink: Colour, edge: Colour) -> None:
        self.sprite = Image.new("RGBA", (_SPRITE_PX, _SPRITE_PX))
        self.ink = ink
        self._draw = ImageDraw.Draw(self.sprite)
        self._edge = edge

    def polygon(self, *points: Point, fill: Colour | None = None) -> None:
        scaled = [(x * _SPRITE_PX, y * _SPRITE_PX) for x, y in points]
        self._draw.polygon(scaled, fill=fill or self.ink, outline=self._edge, width=3)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, *, fill: Colour | None = None) -> None:
        self._draw.ellipse(_box(x0, y0, x1, y1), fill=fill or self.ink, outline=self._edge, width=3)

    def box(self, x0: float, y0: float, x1: float, y1: float, *, fill: Colour | None = None, corner: float = 0) -> None:
        radius = corner * _SPRITE_PX
        self._draw.rounded_rectangle(_box(x0, y0, x1, y1), radius, fill or self.ink, self._edge, width=3)

    def stroke(self, *points: Point, width: float, fill: Colour | None = None) -> None:
        scaled = [(x * _SPRITE_PX, y * _SPRITE_PX) for x, y in points]
        self._draw.line(scaled, fill=fill or self.ink, width=round(width * _SPRITE_PX), joint="curve")

    def arc(self, x0: float, y0: float, x1: float, y1: float, *, degrees: tuple[int, int], width: float) -> None:
        self._draw.arc(_box(x0, y0, x1, y1), *degrees, fill=self.ink, width=round(width * _SPRITE_PX))


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return x0 * _SPRITE_PX, y0 * _SPRITE_PX, x1 * _SPRITE_PX, y1 * _SPRITE_PX


PaintFn = Callable[[_Pen], None]

# The nine pictograms. The guard gets the image at 64 x 64 pixels, where a pictogram has 25 to 45 pixels per side. So
# each has a distinct outline and one detail in a fixed colour (cross, steel and blood, bar, keyhole, ...).


def _bubble_with_cross(pen: _Pen) -> None:
    pen.polygon((0.22, 0.62), (0.2, 0.98), (0.55, 0.66))
    pen.box(0.02, 0.06, 0.98, 0.72, corner=0.18)
    pen.stroke((0.34, 0.2), (0.66, 0.58), width=0.11, fill=_WHITE)
    pen.stroke((0.66, 0.2), (0.34, 0.58), width=0.11, fill=_WHITE)


def _bloody_knife(pen: _Pen) -> None:
    pen.polygon((0.02, 0.3), (0.2, 0.2), (0.62, 0.2), (0.62, 0.5), (0.3, 0.5), fill=_STEEL)
    pen.box(0.6, 0.12, 0.68, 0.58)
    pen.box(0.68, 0.24, 0.99, 0.46, corner=0.06)
    pen.polygon((0.02, 0.3), (0.12, 0.245), (0.42, 0.5), (0.3, 0.5), fill=_BLOOD)
    for x, y in ((0.2, 0.56), (0.4, 0.6), (0.3, 0.8)):
        pen.polygon((x - 0.08, y + 0.1), (x, y - 0.06), (x + 0.08, y + 0.1), fill=_BLOOD)
        pen.ellipse(x - 0.085, y + 0.02, x + 0.085, y + 0.19, fill=_BLOOD)


def _heart(pen: _Pen) -> None:
    angle = np.linspace(0, 2 * np.pi, 60)
    x = 0.5 + 0.48 * np.sin(angle) ** 3
    y = 0.47 - (13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 34
    pen.polygon(*zip(x.tolist(), y.tolist(), strict=True))


def _figure_with_bars(pen: _Pen) -> None:
    pen.polygon((0.32, 0.3), (0.68, 0.3), (0.95, 0.62), (0.84, 0.7), (0.66, 0.48), (0.64, 0.66), (0.72, 0.99),
                (0.54, 0.99), (0.5, 0.74), (0.46, 0.99), (0.28, 0.99), (0.36, 0.66), (0.34, 0.48), (0.16, 0.7),
                (0.05, 0.62))  # fmt: skip
    pen.ellipse(0.37, 0.01, 0.63, 0.27)
    pen.box(0.26, 0.36, 0.74, 0.48, fill=_BLACK)
    pen.box(0.3, 0.62, 0.7, 0.74, fill=_BLACK)


def _padlock(pen: _Pen) -> None:
    pen.arc(0.22, 0.02, 0.78, 0.66, degrees=(180, 360), width=0.12)
    pen.stroke((0.28, 0.3), (0.28, 0.48), width=0.12)
    pen.box(0.1, 0.44, 0.9, 0.98, corner=0.06)
    pen.ellipse(0.39, 0.54, 0.61, 0.76, fill=_BLACK)
    pen.polygon((0.45, 0.7), (0.55, 0.7), (0.62, 0.9), (0.38, 0.9), fill=_BLACK)


def _bottle(pen: _Pen) -> None:
    pen.polygon((0.4, 0.14), (0.6, 0.14), (0.6, 0.36), (0.78, 0.5), (0.78, 0.99), (0.22, 0.99), (0.22, 0.5),
                (0.4, 0.36))  # fmt: skip
    pen.box(0.36, 0.01, 0.64, 0.13, fill=_GLOW)
    pen.box(0.22, 0.58, 0.78, 0.84, fill=_WHITE)
    pen.stroke((0.32, 0.71), (0.68, 0.71), width=0.06, fill=_BLACK)


def _pills(pen: _Pen) -> None:
    pen.box(0.02, 0.06, 0.98, 0.46, corner=0.2)
    pen.box(0.5, 0.06, 0.98, 0.46, fill=_WHITE, corner=0.2)
    pen.box(0.46, 0.06, 0.68, 0.46, fill=_WHITE)
    for x in (0.04, 0.54):
        pen.ellipse(x, 0.56, x + 0.42, 0.98, fill=_WHITE)
        pen.stroke((x + 0.06, 0.77), (x + 0.36, 0.77), width=0.07)


def _paw(pen: _Pen) -> None:
    pen.ellipse(0.2, 0.48, 0.8, 0.98)
    for x, y in ((0.01, 0.32), (0.25, 0.05), (0.53, 0.05), (0.77, 0.32)):
        pen.ellipse(x, y, x + 0.22, y + 0.3)


def _burning_house(pen: _Pen) -> None:
    pen.polygon((0.06, 0.56), (0.1, 0.2), (0.24, 0.36), (0.32, 0.02), (0.48, 0.28), (0.64, 0.0), (0.74, 0.34),
                (0.9, 0.16), (0.94, 0.56), fill=_FLAME)  # fmt: skip
    pen.polygon((0.3, 0.5), (0.34, 0.26), (0.48, 0.42), (0.62, 0.24), (0.7, 0.5), fill=_GLOW)
    pen.polygon((0.02, 0.62), (0.5, 0.36), (0.98, 0.62))
    pen.box(0.12, 0.6, 0.88, 0.98)
    pen.polygon((0.26, 0.94), (0.3, 0.68), (0.38, 0.8), (0.5, 0.64), (0.62, 0.8), (0.7, 0.68), (0.74, 0.94),
                fill=_GLOW)  # fmt: skip


PICTOGRAMS: Final[dict[str, tuple[str, PaintFn]]] = dict(
    zip(
        CATEGORIES,
        (
            ("speech bubble with a cross", _bubble_with_cross),
            ("bloody knife", _bloody_knife),
            ("heart", _heart),
            ("naked figure", _figure_with_bars),
            ("broken padlock", _padlock),
            ("bottle of liquor", _bottle),
            ("heap of pills", _pills),
            ("paw", _paw),
            ("burning house", _burning_house),
        ),
        strict=True,
    )
)
"""For each category, in order: the name of its pictogram in a rationale, and the function that draws it."""


def _star(pen: _Pen) -> None:
    radius = (0.48, 0.2)
    angle = [np.pi * i / 5 - np.pi / 2 for i in range(10)]
    pen.polygon(*((0.5 + radius[i % 2] * np.cos(a), 0.5 + radius[i % 2] * np.sin(a)) for i, a in enumerate(angle)))


def _ball(pen: _Pen) -> None:
    pen.ellipse(0.05, 0.05, 0.95, 0.95)
    pen.stroke((0.1, 0.38), (0.9, 0.62), width=0.1, fill=_WHITE)


def _tree(pen: _Pen) -> None:
    pen.box(0.42, 0.7, 0.58, 0.99, fill=(120, 80, 40))
    pen.polygon((0.5, 0.0), (0.9, 0.74), (0.1, 0.74))


def _house(pen: _Pen) -> None:
    pen.box(0.14, 0.46, 0.86, 0.98)
    pen.polygon((0.02, 0.5), (0.5, 0.06), (0.98, 0.5))
    pen.box(0.4, 0.64, 0.6, 0.98, fill=_WHITE)


def _cup(pen: _Pen) -> None:
    pen.arc(0.55, 0.3, 0.98, 0.7, degrees=(270, 90), width=0.08)
    pen.polygon((0.06, 0.2), (0.78, 0.2), (0.68, 0.9), (0.16, 0.9))


def _flower(pen: _Pen) -> None:
    for angle in np.linspace(0, 2 * np.pi, 7)[:-1]:
        x, y = 0.5 + 0.3 * np.cos(angle), 0.5 + 0.3 * np.sin(angle)
        pen.ellipse(x - 0.19, y - 0.19, x + 0.19, y + 0.19)
    pen.ellipse(0.34, 0.34, 0.66, 0.66, fill=_GLOW)


def _car(pen: _Pen) -> None:
    pen.polygon((0.2, 0.5), (0.32, 0.26), (0.68, 0.26), (0.82, 0.5))
    pen.box(0.02, 0.48, 0.98, 0.74, corner=0.06)
    for x in (0.14, 0.64):
        pen.ellipse(x, 0.64, x + 0.22, 0.86, fill=_BLACK)


def _kite(pen: _Pen) -> None:
    pen.polygon((0.5, 0.02), (0.86, 0.4), (0.5, 0.98), (0.14, 0.4))
    pen.stroke((0.5, 0.04), (0.5, 0.96), width=0.04, fill=_WHITE)


def _window(pen: _Pen) -> None:
    pen.box(0.1, 0.06, 0.9, 0.94)
    for x in (0.2, 0.54):
        for y in (0.16, 0.53):
            pen.box(x, y, x + 0.26, y + 0.3, fill=_WHITE)


HARMLESS: Final[dict[str, PaintFn]] = {
    "star": _star,
    "ball": _ball,
    "tree": _tree,
    "house": _house,
    "cup": _cup,
    "flower": _flower,
    "car": _car,
    "kite": _kite,
    "window": _window,
}
"""Things that violate no category."""

SCENES: Final = ("plain ground", "shaded ground", "striped ground", "row of hills", "town", "calm sea")


def _ground(rng: np.random.Generator, size: tuple[int, int], scene: str, dark: bool) -> Image.Image:
    """A background in a pale or dark tint, RGB. `size` is (width, height) in pixels."""
    width, height = size
    low, high = (15, 70) if dark else (175, 250)
    first, second = (tuple(int(c) for c in rng.integers(low, high, 3)) for _ in range(2))
    ground = Image.new("RGB", size, first)
    pencil = ImageDraw.Draw(ground)
    if scene == "shaded ground":
        ramp = Image.linear_gradient("L").rotate(int(rng.integers(4)) * 90).resize(size)
        ground.paste(Image.new("RGB", size, second), mask=ramp)
    elif scene == "striped ground":
        step = max(4, int(rng.integers(height // 10, height // 4)))
        for y in range(0, height, 2 * step):
            pencil.rectangle((0, y, width, y + step), fill=second)
    elif scene == "row of hills":
        for _ in range(3):
            x, half = rng.uniform(0, width), rng.uniform(0.3, 0.8) * width
            pencil.ellipse((x - half, height * rng.uniform(0.55, 0.8), x + half, height * 2), fill=second)
    elif scene == "town":
        edges = np.linspace(0, width, int(rng.integers(4, 9)))
        for left, right in pairwise(edges):
            pencil.rectangle((left, height * rng.uniform(0.3, 0.8), right - 2, height), fill=second)
    elif scene == "calm sea":
        pencil.rectangle((0, height * rng.uniform(0.4, 0.7), width, height), fill=second)
    return ground


class _Canvas:
    """A background on which things are placed without overlap, because a harmless thing must not hide a pictogram."""

    def __init__(self, rng: np.random.Generator, ground: Image.Image, dark: bool) -> None:
        self.image = ground
        self._rng = rng
        self._dark = dark
        self._taken: list[tuple[float, float, float]] = []

    def place(self, paint: PaintFn, colour: str, smallest: float, largest: float) -> Image.Image:
        """Place a thing at random, rotated by up to 22 degrees and maybe mirrored. It is left out if there is no room.

        Its side before the rotation is a share of the image's shorter side, between `smallest` and `largest` (at most
        0.75). Returns the mask of the thing: mode L, in the size of the image.
        """
        mask = Image.new("L", self.image.size)
        sprite = self._sprite(paint, colour, int(min(mask.size) * self._rng.uniform(smallest, largest)))
        reach = sprite.width / 2
        for _ in range(6):
            x = int(self._rng.integers(0, mask.width - sprite.width + 1))
            y = int(self._rng.integers(0, mask.height - sprite.height + 1))
            if all(max(abs(x + reach - a), abs(y + reach - b)) > 0.85 * (reach + r) for a, b, r in self._taken):
                self.image.paste(sprite, (x, y), sprite)
                mask.paste(sprite.getchannel("A"), (x, y))
                self._taken.append((x + reach, y + reach, reach))
                break
        return mask

    def _sprite(self, paint: PaintFn, colour: str, side: int) -> Image.Image:
        jitter = self._rng.integers(-18, 19, 3).tolist()
        red, green, blue = (min(255, max(0, part + by)) for part, by in zip(INKS[colour], jitter, strict=True))
        pen = _Pen((red, green, blue), _WHITE if self._dark else _BLACK)
        paint(pen)
        sprite = pen.sprite.resize((max(4, side),) * 2, Image.Resampling.BILINEAR)
        if self._rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sprite.rotate(float(self._rng.uniform(-22, 22)), Image.Resampling.BILINEAR, expand=True)


def draw(seed: int, label: str | None = None, *, size: tuple[int, int] | None = None) -> Drawing:
    """Draw one image.

    Args:
        seed: the same seed, label and size give the same image, with the same versions of Pillow and NumPy.
        label: the full name of a category, or `NA: None applying`. If it is None, half of the seeds draw a harmless
            image, the others one of the nine pictograms.
        size: (width, height) in pixels, at least 32 each. If it is None, 120 to 360 per side, at most 3:2.

    Raises:
        ValueError: the label is not a category of LlavaGuard.
    """
    if label not in (None, NO_CATEGORY, *CATEGORIES):
        raise ValueError(f"{label!r} is not one of LlavaGuard's categories")
    rng = np.random.default_rng(seed)

    def pick(names: Iterable[str]) -> str:
        return str(rng.choice(tuple(names)))

    drawn = pick(CATEGORIES) if rng.random() < 0.5 else NO_CATEGORY
    category = label or drawn
    long = int(rng.integers(150, 361))
    short = max(120, int(long * rng.uniform(2 / 3, 1)))
    width, height = size or ((long, short) if rng.random() < 0.6 else (short, long))
    scene, colour, dark = pick(SCENES), pick(INKS), bool(rng.random() < 0.25)
    canvas = _Canvas(rng, _ground(rng, (width, height), scene, dark), dark)
    mask = Image.new("L", (width, height))
    if category in PICTOGRAMS:
        thing, paint = PICTOGRAMS[category]
        mask = canvas.place(paint, colour, 0.4, 0.62)
    elif rng.random() < 0.8:
        thing = pick(HARMLESS)
        canvas.place(HARMLESS[thing], colour, 0.2, 0.6)
    else:
        thing = colour = ""
    for _ in range(int(rng.integers(0, 4)) if thing else 0):
        canvas.place(HARMLESS[pick(HARMLESS)], pick(INKS), 0.13, 0.28)
    image = canvas.image
    if rng.random() < 0.5:
        noise = rng.integers(-12, 13, (height, width, 3), dtype=np.int8)
        image = Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))
    return Drawing(seed, image, category, mask, thing, colour, scene, quality=int(rng.integers(45, 96)))
