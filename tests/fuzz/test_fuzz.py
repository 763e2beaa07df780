"""A small share of `make fuzz`, and everything that it has ever found."""

from itertools import islice

from tests.fuzz.cases import images, messages, mutated
from tests.fuzz.run import fuzz_formats, fuzz_images


def test_fuzz_formats_mutated_messages_break_no_rule() -> None:
    assert fuzz_formats(islice(mutated(messages(), 7), 3000))["wrong"] == 0


async def test_fuzz_images_mutated_images_break_no_rule() -> None:
    ends, _ = await fuzz_images(islice(mutated(images(), 7), 600))
    assert ends["wrong"] == 0
    assert ends["prepared"] > 17
