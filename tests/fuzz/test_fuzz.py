"""A small share of `make fuzz`, and everything that it has ever found."""

from itertools import islice

from tests.fuzz.cases import images, messages, mutated
from tests.fuzz.run import fuzz_formats, fuzz_images


def test_formats() -> None:
    assert fuzz_formats(islice(mutated(messages(), 7), 3000))["wrong"] == 0


async def test_images() -> None:
    ends, _ = await fuzz_images(islice(mutated(images(), 7), 600))
    assert ends["wrong"] == 0
    assert ends["prepared"] > 17
