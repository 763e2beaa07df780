"""Order by key: messages with a shared key run in the order of arrival, all others at once."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.intake.key_order import KeyOrder, LatestEvents
from services.core.messages import Submission
from services.streams.parsing import ParsedSubmission

keys = st.frozensets(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3)


@settings(max_examples=60)
@given(st.lists(keys, max_size=25), st.integers(0, 10_000))
def test_messages_with_a_shared_key_run_in_order(messages: list[frozenset[bytes]], seed: int) -> None:
    key_order, rng = KeyOrder(), random.Random(seed)
    running: set[int] = set()
    done: list[int] = []

    async def work(number: int) -> None:
        ticket = key_order.enqueue(messages[number])
        await key_order.wait(ticket)
        assert not any(messages[number] & messages[other] for other in running)
        running.add(number)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        running.discard(number)
        done.append(number)
        key_order.release(ticket)

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*map(work, range(len(messages)))), 5)

    asyncio.run(run())
    for key in (b"a", b"b", b"c", b"d"):
        order = [number for number in done if key in messages[number]]
        assert order == sorted(order)
    assert not key_order._last, "no queue is left behind"


def event(sequencer: str | None, uri: str = "s3://b/k") -> ParsedSubmission:
    return ParsedSubmission(Submission(id=f"{uri}#{sequencer}", uri=uri), uri.encode(), b"", sequencer)


def test_earlier_event_of_an_object_is_superseded() -> None:
    latest = LatestEvents()
    for sequencer in ("0A", "0C", "0B"):
        latest.add(event(sequencer))
    latest.add(event("FF", "s3://b/other"))
    latest.add(event(None))
    assert [latest.is_superseded(event(s)) for s in ("0A", "0B", "0C", None)] == [True, True, False, False]
