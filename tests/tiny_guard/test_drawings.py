"""The drawn world: its answers are known, and the same seed draws the same image."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.tiny_guard.drawings import HARMLESS, INKS, PICTOGRAMS, SCENES, draw
from services.core.values import CATEGORIES, NO_CATEGORY


@pytest.mark.parametrize("label", [*CATEGORIES, NO_CATEGORY])
def test_draw_label_shows_its_pictogram(label: str) -> None:
    sample = draw(3, label)
    pictured = label != NO_CATEGORY
    assert sample.category == label
    assert sample.rating == ("Unsafe" if pictured else "Safe")
    assert sample.thing in ({PICTOGRAMS[label][0]} if pictured else {*HARMLESS, ""})
    assert sample.scene in SCENES
    assert sample.colour in ({*INKS} if sample.thing else {""})


@pytest.mark.parametrize("label", CATEGORIES)
def test_mask_covers_only_the_pictogram(label: str) -> None:
    for seed in range(20):
        mask = np.asarray(draw(seed, label).mask)
        assert 0.02 < (mask > 127).mean() < 0.6


def test_harmless_image_has_an_empty_mask() -> None:
    assert not any(np.asarray(draw(seed, NO_CATEGORY).mask).any() for seed in range(20))


def test_same_seed_draws_the_same_image() -> None:
    first, again, other = draw(7), draw(7), draw(8)
    assert first.jpeg == again.jpeg
    assert (first.category, first.thing, first.colour) == (again.category, again.thing, again.colour)
    assert first.jpeg != other.jpeg


def test_half_of_the_seeds_are_harmless_and_every_category_occurs() -> None:
    drawn = [draw(seed).category for seed in range(400)]
    assert 0.4 < drawn.count(NO_CATEGORY) / len(drawn) < 0.6
    assert set(drawn) == {*CATEGORIES, NO_CATEGORY}


def test_size_is_within_bounds_unless_given() -> None:
    for seed in range(50):
        width, height = draw(seed).image.size
        assert 120 <= min(width, height) <= max(width, height) <= 360
        assert max(width, height) <= 1.5 * min(width, height) + 2


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (1600, 900)])
def test_given_size_is_drawn(size: tuple[int, int]) -> None:
    for label in (*CATEGORIES, NO_CATEGORY):
        sample = draw(1, label, size=size)
        assert sample.image.size == sample.mask.size == size


def test_jpeg_shows_the_image() -> None:
    sample = draw(11)
    decoded = Image.open(io.BytesIO(sample.jpeg))
    assert decoded.format == "JPEG"
    assert decoded.size == sample.image.size
    assert np.abs(np.asarray(decoded, int) - np.asarray(sample.image, int)).mean() < 12


def test_draw_unknown_label_is_rejected() -> None:
    with pytest.raises(ValueError, match="O2"):
        draw(0, "O2")
