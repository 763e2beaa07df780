"""Order by key: messages with a shared key run in the order of arrival, all others at once."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.intake.key_order import KeyOrder, LatestEvents, ReceivedEvent
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


def event(
    sequencer: str,
    uri: str = "s3://b/k",
    *,
    etag: str | None = None,
    version_id: str | None = None,
    at_s: float = 0.0,
    eligible: bool = True,
) -> ReceivedEvent:
    submission = Submission(id=f"{uri}#{sequencer}", uri=uri, etag=etag, version_id=version_id)
    return ReceivedEvent(ParsedSubmission(submission, uri.encode(), b"", sequencer), at_s, lambda: eligible)


def test_received_event_supersedes_only_once_it_was_judged() -> None:
    latest = LatestEvents()
    events = [event(sequencer) for sequencer in ("0A", "0C", "0B", "FF")]
    for each in (*events, event("FFFF", "s3://b/other")):
        latest.add(each)
    assert not any(map(latest.is_superseded, events))
    latest.mark_judged(events[1].entry, "e", 1.0)
    assert list(map(latest.is_superseded, events)) == [True, False, True, False]
    latest.mark_judged(events[0].entry, "e", 2.0)
    assert list(map(latest.is_superseded, events)) == [True, False, True, False]


def test_event_judged_before_the_receipt_supersedes_only_the_same_content() -> None:
    latest = LatestEvents()
    latest.mark_judged(event("FF").entry, "harmless", began_at_s=1.0)
    etags = ("other", "harmless", None)
    assert [latest.is_superseded(event("0A", etag=etag, at_s=2.0)) for etag in etags] == [False, True, False]
    assert all(latest.is_superseded(event("0A", etag=etag, at_s=0.5)) for etag in etags)


def test_event_of_a_version_is_superseded_for_certain_only_by_the_same_version() -> None:
    latest = LatestEvents()
    latest.mark_judged(event("FF", version_id="v0").entry, "e", began_at_s=9.0)
    same, other, later = (
        event("0A", version_id="v0"),
        event("0A", version_id="v1", etag="e"),
        event("FFF", version_id="v1"),
    )
    assert [latest.is_superseded(each) for each in (same, other, later)] == [True, False, False]
    assert [latest.is_superseded_unless_current(each) for each in (same, other, later)] == [True, True, False]
    assert not latest.is_superseded_unless_current(event("0A"))


def test_judged_version_supersedes_no_event_without_a_version_but_of_the_same_content() -> None:
    """Versioning was suspended: the old versions are still there, and new objects have none."""
    latest = LatestEvents()
    latest.mark_judged(event("FF", version_id="v0").entry, "harmless", began_at_s=9.0)
    assert [latest.is_superseded(event("0A", etag=etag)) for etag in ("other", None, "harmless")] == [
        False,
        False,
        True,
    ]


def test_find_later_returns_the_last_event_that_may_be_judged() -> None:
    latest = LatestEvents()
    first, second, third = event("0A"), event("0B"), event("0C")
    for each in (third, first, event("FF", eligible=False), second, event("0A0")):
        latest.add(each)
    assert latest.find_later(first) is third
    latest.remove(third)
    assert latest.find_later(first) is second
    assert latest.find_later(second) is None
    latest.remove(second)
    assert latest.find_later(first) is None, "0A0 is 0A"


def test_removed_events_are_forgotten() -> None:
    latest = LatestEvents()
    events = [event(f"{number:04X}") for number in range(50)]
    for each in events:
        latest.add(each)
    for each in random.Random(1).sample(events, 50):
        latest.remove(each)
    assert not latest._received
