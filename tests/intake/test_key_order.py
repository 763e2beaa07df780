"""Order by key: whoever shares a key is worked on in the order of arrival, everyone else at once."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.intake.key_order import NewestEvents, Turns
from services.core.messages import Submission
from services.streams.parsing import ParsedSubmission

keys = st.frozensets(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3)


@settings(max_examples=60)
@given(st.lists(keys, max_size=25), st.integers(0, 10_000))
def test_in_order_by_key(messages: list[frozenset[bytes]], seed: int) -> None:
    turns, rng = Turns(), random.Random(seed)
    running: set[int] = set()
    done: list[int] = []

    async def work(number: int) -> None:
        turn = turns.join(messages[number])
        await turn.comes()
        assert not any(messages[number] & messages[other] for other in running)
        running.add(number)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        running.discard(number)
        done.append(number)
        turns.end(turn)

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*map(work, range(len(messages)))), 5)

    asyncio.run(run())
    for key in (b"a", b"b", b"c", b"d"):
        order = [number for number in done if key in messages[number]]
        assert order == sorted(order)
    assert not turns._last, "no line is left behind"


def event(sequencer: str | None, uri: str = "s3://b/k") -> ParsedSubmission:
    return ParsedSubmission(Submission(id=f"{uri}#{sequencer}", uri=uri), uri.encode(), b"", sequencer)


def test_the_newest_event_of_an_object_counts() -> None:
    newest = NewestEvents()
    for sequencer in ("0A", "0C", "0B"):
        newest.add(event(sequencer))
    newest.add(event("FF", "s3://b/other"))
    newest.add(event(None))
    assert [newest.has_overtaken(event(s)) for s in ("0A", "0B", "0C", None)] == [True, True, False, False]
