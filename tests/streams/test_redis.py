"""Features of Redis Streams only: scripts, claims, retention, and entries of other producers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from services.core.errors import NotOwned, StreamUnavailable
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from services.streams.redis import scripts as redis_scripts
from tests.streams.fleet import Fleet
from tests.support.servers import Valkey
from tests.support.streams_bench import PATIENT, Streams, collect, eventually, values


@pytest.fixture
async def streams(valkey_url: str) -> AsyncIterator[Streams]:
    streams = Streams("redis", valkey_url)
    yield streams
    await streams.close()


@pytest.fixture
async def client(valkey_url: str) -> AsyncIterator[Any]:
    async with Redis.from_url(valkey_url, protocol=2) as client:
        yield client


async def test_entry_of_another_form_keeps_all_fields(streams: Streams, client: Any) -> None:
    stream = streams.settings().submissions_stream
    await client.execute_command("XADD", stream, "*", b"payload", b"\xff\x00", b"\xff", b"x", b"payload", b"again")
    await client.execute_command("XADD", stream, "*", "value", "v", "key", "k", "header:h", "1", "extra", "2")
    odd, extra = await collect(await streams.member(), 2)
    assert (odd.value, odd.key) == (b"", None)
    assert odd.headers == (("field:payload", b"\xff\x00"), ("field:\\xff", b"x"), ("field:payload", b"again"))
    assert (extra.value, extra.key, extra.headers) == (b"v", b"k", (("h", b"1"), ("field:extra", b"2")))


async def test_entry_with_a_future_id_is_settled(streams: Streams, client: Any) -> None:
    stream = streams.settings().submissions_stream
    await client.xadd(stream, {"value": "v"}, id="18446744073709551614-1")
    member = await streams.member()
    (message,) = await collect(member, 1)
    await member.settle(message, [streams.verdict("v")])
    assert (await member.lag()).total == 0


async def test_more_headers_than_a_script_takes_are_kept(streams: Streams) -> None:
    headers = tuple((f"h{number}", bytes([number % 256])) for number in range(5000))
    await streams.publish(OutgoingMessage(streams.settings().submissions_stream, b"v", None, headers))
    member = await streams.member()
    (message,) = await collect(member, 1)
    assert message.headers == headers
    await member.settle(message, [OutgoingMessage(streams.settings().dead_letters_stream, b"v", None, message.headers)])
    (letter,) = await streams.everything(streams.settings().dead_letters_stream)
    assert letter.headers == headers


async def test_message_delivered_again_counts_its_attempts(streams: Streams) -> None:
    await streams.submit("a")
    first = await streams.member("first", **PATIENT)
    assert [message.attempts for message in await collect(first, 1)] == [1]
    await first.close()
    second = await streams.member("second")
    assert [message.attempts for message in await collect(second, 1)] == [2]


async def test_concurrent_settle_of_a_lost_message_publishes_nothing(streams: Streams) -> None:
    await streams.submit("a")
    slow = await streams.member("slow", **PATIENT)
    (held,) = await collect(slow, 1)
    quick = await streams.member("quick", redis_claim_idle_s=0.05)
    (taken,) = await collect(quick, 1)
    outcomes = await asyncio.gather(
        *(slow.settle(held, [streams.verdict("slow")]) for _ in range(5)),
        quick.settle(taken, [streams.verdict("quick")]),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [NotOwned] * 5 + [type(None)]
    assert await streams.verdicts() == ["quick"]


async def test_settle_with_a_lost_answer_publishes_once(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    await streams.submit("a")
    member: Any = await streams.member()
    (message,) = await collect(member, 1)
    script = member._settle
    answers: list[int] = []

    async def lose_the_first(**arguments: Any) -> int:
        answers.append(await script(**arguments))
        if len(answers) == 1:
            raise ConnectionError("connection reset by peer")
        return answers[-1]

    monkeypatch.setattr(member, "_settle", lose_the_first)
    await member.settle(message, [streams.verdict("a")])
    assert answers == [1, -1]
    assert await streams.verdicts() == ["a"]


async def test_cancelled_receive_loses_no_message(streams: Streams) -> None:
    member = await streams.member(redis_claim_idle_s=0.3)
    seen: set[str] = set()
    for number in range(20):
        receiving = asyncio.create_task(member.receive(10, 1.0))
        await asyncio.sleep(0.002)
        submitting = asyncio.create_task(streams.submit(str(number)))
        await asyncio.sleep(0.001 * (number % 5))
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            seen.update(values(await receiving))
        await submitting

    async def all_seen() -> bool:
        seen.update(values(await member.receive(10, 0.2)))
        return len(seen) == 20

    await eventually(all_seen)


async def test_deleted_group_is_created_again(streams: Streams, client: Any) -> None:
    settings = streams.settings()
    member = await streams.member()
    await streams.submit("lost")
    (lost,) = await collect(member, 1)
    await client.delete(settings.submissions_stream)
    assert (await member.lag()).total == 0
    await streams.submit("new")
    assert values(await collect(member, 1)) == ["new"]
    with pytest.raises(NotOwned):
        await member.settle(lost, [streams.verdict("lost")])
    assert await streams.verdicts() == []


async def test_flushed_scripts_are_loaded_again(streams: Streams, client: Any) -> None:
    await streams.submit("a", "b")
    member = await streams.member()
    first, second = await collect(member, 2)
    await member.settle(first, [streams.verdict("a")])
    await client.script_flush()
    await member.settle(second, [streams.verdict("b")])
    assert await streams.verdicts() == ["a", "b"]


async def test_lag_is_counted_when_the_server_does_not_report_it(streams: Streams, client: Any) -> None:
    stream = streams.settings().submissions_stream
    member = await streams.member()
    await streams.submit(*"abcdefgh")
    await collect(member, 2)
    entries = await client.xrange(stream)
    await client.xdel(stream, entries[4][0])  # a hole makes the server's own figure null
    (group,) = await client.xinfo_groups(stream)
    assert group["lag"] is None
    assert (await member.lag()).total == 7


async def test_retention_keeps_unsettled_entries(streams: Streams, client: Any) -> None:
    stream = streams.settings().submissions_stream
    for number in range(600):  # the server trims by whole nodes of 100 entries
        await client.xadd(stream, {"value": str(number)}, id=f"{1000 + number}-0")
    member = await streams.member(in_flight=600)
    trim = client.register_script(redis_scripts.TRIM)
    assert await trim(keys=[stream], args=[1000]) == 0  # nothing was delivered
    received = await collect(member, 400)
    for message in received[:250] + received[251:]:
        await member.settle(message, [])
    await trim(keys=[stream], args=[1000])
    kept = {int(fields[b"value"]) for _, fields in await client.xrange(stream)}
    assert set(range(250, 600)) <= kept  # 250 is pending
    assert len(kept) < 600
    await member.settle(received[250], [])
    await trim(keys=[stream], args=[1000])
    kept = {int(fields[b"value"]) for _, fields in await client.xrange(stream)}
    assert set(range(400, 600)) <= kept  # never delivered
    assert len(kept) < 350
    assert await trim(keys=[stream], args=[10**13]) == 0  # younger than the retention
    assert await trim(keys=[f"{stream}.none"], args=[1000]) == 0


async def test_idle_consumers_of_ended_members_are_deleted(streams: Streams, client: Any) -> None:
    settings = streams.settings()
    await streams.submit("a", "b")
    leaving = await streams.member("leaving", **PATIENT)
    await collect(leaving, 2)
    await leaving.close()

    async def names() -> set[str]:
        consumers = await client.xinfo_consumers(settings.submissions_stream, settings.group)
        return {each["name"].decode().rsplit("-", 1)[0] for each in consumers}

    assert await names() == {"leaving"}  # deleting it would delete what it held
    heir = await streams.member("heir", **PATIENT)
    await collect(heir, 2)
    delete_idle = client.register_script(redis_scripts.DELETE_IDLE_CONSUMERS)
    for silent_ms, expected in ((60_000, {"leaving", "heir"}), (0, {"heir"})):
        await delete_idle(keys=[settings.submissions_stream], args=[settings.group, "someone", silent_ms])
        assert await names() == expected
    idle = await streams.member("idle")
    await idle.receive(1, 0.01)
    assert await names() == {"heir", "idle"}
    await idle.close()
    assert await names() == {"heir"}


@pytest.mark.server
async def test_publish_during_an_outage_is_unavailable(tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    server.start()
    publisher = await open_publisher(StreamConfig.from_settings(Streams("redis", server.url).settings()))
    server.kill()
    with pytest.raises(StreamUnavailable):
        await publisher.publish([OutgoingMessage("s", b"v")])
    await asyncio.to_thread(server.start)
    await publisher.publish([OutgoingMessage("s", b"v")])
    await publisher.close()
    server.kill()


@pytest.mark.server
async def test_outputs_are_published_once_when_members_and_server_are_killed(tmp_path: Path) -> None:
    """A server that writes everything to disk before it answers, its members and the server itself killed."""
    server = Valkey(tmp_path / "valkey")
    server.start()
    streams = Streams("redis exactly once", server.url)
    fleet = Fleet(streams, tmp_path)
    try:
        for name in "abc":
            fleet.start(name)
        for name in "abca":
            await fleet.submit(300)
            await fleet.settled(0.6)
            fleet.kill(name)
            fleet.start(name)
        await fleet.submit(300)
        await fleet.settled(0.9)
        server.kill()
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(fleet.stop, "b")
        await fleet.settled()
        await fleet.check()
    finally:
        fleet.end()
        server.kill()
