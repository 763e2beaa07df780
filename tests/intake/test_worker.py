"""What goes in by the stream, and what comes out: bad input, outages, hand-over. The guard is scripted."""

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.intake import processor, worker
from pipelines.tiny_guard.drawings import draw
from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, UnreadableAnswer
from services.core.values import Assessment, Detail, PreparedImage, Priority
from services.policies.document import PolicyDocument
from services.policies.registry import PolicyRegistry
from services.streams.base import Lag
from tests.end_to_end.corpus import bad_input, events
from tests.support.fake_guard import MODEL, says_safe
from tests.support.intake_bench import Bench
from tests.support.servers import Valkey
from tests.support.streams_bench import eventually


async def test_every_row_of_bad_input(bench: Bench) -> None:
    await bench.start()
    cases = [*bad_input(bench.put), *events(bench.put)]
    for case in cases:
        await bench.submit(case.value, case.key, **case.headers)
    expected = Counter(case.end for case in cases if case.end != "nothing")
    verdicts, letters = await bench.settled(expected.total())
    assert Counter(letter.reason for letter in letters) + Counter(verdict=len(verdicts)) == expected
    originals = Counter(message.value for message in await bench.read(bench.settings.dead_letters_stream))
    assert originals == Counter(case.value for case in cases if case.end not in ("verdict", "nothing"))


async def test_several_records_in_one_message_end_one_by_one(bench: Bench) -> None:
    await bench.start()
    etag = bench.put("several.jpg")
    records = [
        {
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "uploads"}, "object": {"key": key, "eTag": etag, "sequencer": f"0{number}"}},
        }
        for number, key in enumerate(["several.jpg", "absent.jpg", "several.jpg"])
    ]
    await bench.submit({"Records": records})
    verdicts, letters = await bench.settled(3)
    assert sorted(verdict.submission_id for verdict in verdicts) == ["uploads/several.jpg#00", "uploads/several.jpg#02"]
    assert [letter.reason for letter in letters] == ["not_found"]
    (letter,) = await bench.read(bench.settings.dead_letters_stream)
    assert json.loads(letter.value) == {"Records": [records[1]]}


async def test_an_answer_that_cannot_be_read_twice_needs_review(bench: Bench) -> None:
    async def garbage(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise UnreadableAnswer("not JSON", MODEL)

    bench.guard.script = garbage
    await bench.start()
    await bench.submit({"id": "a", "uri": "s3://uploads/garbage.jpg"})
    bench.put("garbage.jpg")
    (verdict,), _ = await bench.settled(1)
    assert (verdict.outcome, verdict.reason, verdict.action) == ("needs_review", "unreadable_answer", "review")
    assert (verdict.rating, verdict.category, verdict.score, verdict.model) == (None, None, None, MODEL)
    assert bench.guard.calls == ["verdict", "verdict"]


async def test_an_answer_that_can_be_read_the_second_time_is_a_verdict(bench: Bench) -> None:
    async def once(image: PreparedImage, detail: Detail) -> Assessment:
        if len(bench.guard.calls) == 1:
            raise UnreadableAnswer("not JSON", MODEL)
        return await says_safe(image, detail)

    bench.guard.script = once
    await bench.start()
    bench.put("once.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/once.jpg"})
    (verdict,), _ = await bench.settled(1)
    assert (verdict.outcome, verdict.rating, verdict.reason) == ("verdict", "Safe", None)


async def test_an_image_that_the_engine_refuses(bench: Bench) -> None:
    async def refuse(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise GuardFailed("the engine refuses it")

    bench.guard.script = refuse
    await bench.start()
    bench.put("refused.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/refused.jpg"})
    _, (letter,) = await bench.settled(1)
    assert (letter.reason, letter.submission_id) == ("guard_failed", "a")


async def test_a_first_look_settles_what_is_clearly_safe(bench: Bench) -> None:
    registry = PolicyRegistry(bench.s3, bench.settings.policy_bucket)
    registry.publish(PolicyDocument(name="quick", effort="adaptive", first_look_below=0.1))
    registry.activate("quick", 1, who="test")
    await bench.start()
    bench.put("quick.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/quick.jpg", "policy": "quick"})
    (verdict,), _ = await bench.settled(1)
    assert (verdict.effort, verdict.category, verdict.rationale) == ("first_look", "NA: None applying", None)
    assert bench.guard.calls == ["score"]


async def test_a_first_look_that_is_not_clearly_safe_is_escalated(bench: Bench) -> None:
    async def doubtful(image: PreparedImage, detail: Detail) -> Assessment:
        return replace(await says_safe(image, detail), score=0.3)

    registry = PolicyRegistry(bench.s3, bench.settings.policy_bucket)
    registry.publish(PolicyDocument(name="quick", effort="adaptive", first_look_below=0.1))
    registry.activate("quick", 1, who="test")
    bench.guard.script = doubtful
    await bench.start()
    bench.put("quick.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/quick.jpg", "policy": "quick"})
    (verdict,), _ = await bench.settled(1)
    assert (verdict.effort, verdict.score) == ("full", 0.3)
    assert bench.guard.calls == ["score", "verdict"]


async def test_the_guard_away_for_a_while(bench: Bench) -> None:
    async def away(image: PreparedImage, detail: Detail) -> Assessment:
        if len(bench.guard.calls) < 4:
            raise GuardUnavailable("the engine is restarting")
        return await says_safe(image, detail)

    bench.guard.script = away
    await bench.start()
    bench.put("patient.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/patient.jpg"})
    verdicts, letters = await bench.settled(1)
    assert ([verdict.outcome for verdict in verdicts], letters) == (["verdict"], [])


async def test_access_denied(bench: Bench) -> None:
    """The S3 server of the other tests denies nothing, so this intake's answers everything as S3 does then."""
    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    answer = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def deny(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(deny, "127.0.0.1", 0) as server:
        await bench.start(endpoint=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await bench.submit({"id": "a", "uri": "s3://uploads/denied.jpg"})
        _, (letter,) = await bench.settled(1)
    assert (letter.reason, letter.submission_id) == ("forbidden", "a")


async def test_the_store_away_for_a_while(bench: Bench) -> None:
    """The intake's S3 server is a port on which nobody listens at first."""
    bench.put("late.jpg")
    upstream_host, _, upstream_port = bench.settings.s3_endpoint.removeprefix("http://").partition(":")  # type: ignore[union-attr]

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(upstream_host, int(upstream_port))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer), return_exceptions=True)

    reserved = await asyncio.start_server(forward, "127.0.0.1", 0)
    port = reserved.sockets[0].getsockname()[1]
    reserved.close()
    await bench.start(endpoint=f"http://127.0.0.1:{port}")
    await bench.submit({"id": "a", "uri": "s3://uploads/late.jpg"})
    await asyncio.sleep(1)
    assert (await bench.verdicts(), await bench.letters()) == ([], [])
    async with await asyncio.start_server(forward, "127.0.0.1", port):
        verdicts, letters = await bench.settled(1)
    assert ([verdict.submission_id for verdict in verdicts], letters) == (["a"], [])


async def test_the_stream_killed_and_started_again(bench: Bench, tmp_path: Path) -> None:
    valkey = Valkey(tmp_path / "valkey")
    valkey.start()
    bench.settings = bench.settings.model_copy(update={"stream_url": valkey.url})
    try:
        judging = asyncio.Event()

        async def slow(image: PreparedImage, detail: Detail) -> Assessment:
            judging.set()
            await asyncio.sleep(1)
            return await says_safe(image, detail)

        bench.guard.script = slow
        await bench.start()
        for number in range(5):
            bench.put(f"{number}.jpg")
            await bench.submit({"id": str(number), "uri": f"s3://uploads/{number}.jpg"})
        await judging.wait()
        valkey.kill()
        await asyncio.sleep(2)
        valkey.start()
        verdicts, letters = await bench.settled(5)
        assert (sorted(verdict.submission_id for verdict in verdicts), letters) == (list("01234"), [])
        await bench.close()
    finally:
        valkey.kill()


async def test_what_is_not_finished_in_time_is_left_to_the_next_member(bench: Bench) -> None:
    held, release = asyncio.Event(), asyncio.Event()

    async def hold(image: PreparedImage, detail: Detail) -> Assessment:
        held.set()
        await release.wait()
        return await says_safe(image, detail)

    bench.guard.script = hold
    first = await bench.start(drain_s=0.2)
    bench.put("held.jpg")
    await bench.submit({"id": "held", "uri": "s3://uploads/held.jpg"})
    await held.wait()
    await first.drain()
    assert (await bench.verdicts(), await bench.letters()) == ([], [])
    release.set()
    await bench.start()
    verdicts, _ = await bench.settled(1)
    assert [verdict.submission_id for verdict in verdicts] == ["held"]


async def test_a_member_leaves_although_a_library_takes_a_cancellation_for_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As redis-py does in Python 3.11 when it is cancelled the moment that it has sent a command."""
    sleep = asyncio.sleep
    took: set[Any] = set()

    async def sleeps(seconds: float, *result: Any) -> Any:
        try:
            return await sleep(seconds, *result)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task in took:
                raise
            took.add(task)

    monkeypatch.setattr(asyncio, "sleep", sleeps)
    await bench.start()
    bench.put("leaves.jpg")
    await bench.submit({"uri": "s3://uploads/leaves.jpg"})
    await bench.settled(1)
    closing = asyncio.create_task(bench.close())
    left, _ = await asyncio.wait([closing], timeout=30)
    while not closing.done():  # a member that stays is a test that fails, not one that hangs
        for task in took:
            task.cancel()
        await sleep(0.05)
    assert took
    assert left


async def test_who_asks_for_a_drain_need_not_wait_for_its_end(bench: Bench) -> None:
    intake = await bench.start()
    asked = asyncio.create_task(intake.drain())
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, intake.drain(), return_exceptions=True)
    assert asked.cancelled()
    assert intake.live.consumer._closed  # type: ignore[attr-defined]


async def test_a_lag_that_cannot_be_read_is_unknown_until_it_can(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LAG_INTERVAL_S", 0.02)
    intake = await bench.start()
    transport = intake.live.consumer
    lag, failing = transport.lag, True

    async def changed_password() -> Lag:
        if failing:
            raise ConfigurationError("the server refuses the credentials")
        return await lag()

    monkeypatch.setattr(transport, "lag", changed_password)

    async def is_known() -> bool:
        return "live" in intake.lags

    async def is_unknown() -> bool:
        return not await is_known()

    await eventually(is_unknown)
    failing = False
    await eventually(is_known)


async def test_no_more_in_flight_than_told(bench: Bench) -> None:
    flying = most = 0

    async def count(image: PreparedImage, detail: Detail) -> Assessment:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.05)
        flying -= 1
        return await says_safe(image, detail)

    bench.guard.script = count
    for number in range(30):
        bench.put(f"many-{number}.jpg")
    await bench.submit({"Records": [created(f"many-{number}.jpg") for number in range(30)]})
    for number in range(10):
        await bench.submit({"id": str(number), "uri": f"s3://uploads/many-{number}.jpg"})
    await bench.start(in_flight=4)
    verdicts, letters = await bench.settled(40)
    assert (len(verdicts), letters) == (40, [])
    assert 2 <= most <= 4


async def test_submissions_with_the_same_key_are_judged_in_order_and_others_freely(bench: Bench) -> None:
    first = hashlib.sha256(draw(ord("a")).jpeg).hexdigest()

    async def first_waits_for_the_other(image: PreparedImage, detail: Detail) -> Assessment:
        if image.sha256 == first:
            await bench.settled(1)
        return await says_safe(image, detail)

    bench.guard.script = first_waits_for_the_other
    for name in ("a", "b", "other"):
        bench.put(f"{name}.jpg", draw(ord(name[0])).jpeg)
    await bench.submit({"id": "1", "uri": "s3://uploads/a.jpg"}, key=b"user-1")
    await bench.submit({"id": "2", "uri": "s3://uploads/b.jpg"}, key=b"user-1")
    await bench.submit({"id": "3", "uri": "s3://uploads/other.jpg"}, key=b"user-2")
    await bench.start()
    verdicts, _ = await bench.settled(3)
    assert [verdict.submission_id for verdict in verdicts] == ["3", "1", "2"]


async def test_an_overtaken_event_is_superseded(bench: Bench) -> None:
    bench.put("again.jpg")
    for sequencer in ("0A", "0C", "0B"):
        await bench.submit({"Records": [created("again.jpg", sequencer)]})
    await bench.start()
    verdicts, letters = await bench.settled(3)
    ends = {verdict.submission_id.partition("#")[2]: verdict for verdict in verdicts}
    assert {sequencer: verdict.outcome for sequencer, verdict in ends.items()} == {
        "0A": "superseded",
        "0B": "superseded",
        "0C": "verdict",
    }
    assert letters == []
    assert ends["0A"].action is None
    assert ends["0A"].rating is None


async def test_backfill_waits_for_live_submissions_and_is_judged_as_such(bench: Bench) -> None:
    priorities: list[tuple[str, str]] = []
    assess_each = bench.guard.assess_each

    async def recording(image: PreparedImage, policies: Any, detail: Detail, priority: Priority) -> list[Assessment]:
        priorities.append((image.sha256, priority))
        await asyncio.sleep(0.02)
        return await assess_each(image, policies, detail, priority)

    bench.guard.assess_each = recording  # type: ignore[method-assign]
    for number in range(40):
        bench.put(f"{number}.jpg", draw(number).jpeg)
        backfill = number < 20
        await bench.submit(
            {"id": str(number), "uri": f"s3://uploads/{number}.jpg"},
            stream=bench.settings.backfill_stream if backfill else bench.settings.submissions_stream,
        )
    await bench.start(in_flight=4, with_backfill=True)
    verdicts, letters = await bench.settled(40)
    assert (len(verdicts), letters) == (40, [])
    assert sum(priority == "backfill" for _, priority in priorities) == 20
    order = [int(verdict.submission_id) >= 20 for verdict in verdicts]
    assert sum(order[:20]) > 14, "most of the first half is live"


async def test_a_store_that_denies_everything_does_not_empty_the_stream(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_SYSTEMIC_ERRORS_IN_A_ROW", 5)
    monkeypatch.setattr(processor, "_SYSTEMIC_RETRY_S", 0.2)
    for number in range(20):
        await bench.submit({"id": str(number), "uri": f"s3://uploads/{bench.settings.group}/{number}.jpg"})
    await bench.start()
    await bench.settled(5)
    await asyncio.sleep(1)
    _, letters = await bench.settled(5)
    assert len(letters) == 5, "the others wait, since nothing succeeds"
    for number in range(20):
        bench.put(f"{bench.settings.group}/{number}.jpg")
    verdicts, letters = await bench.settled(20)
    assert (len(verdicts), len(letters)) == (15, 5)


async def test_blocking_submission_needs_review_once_others_succeed(bench: Bench) -> None:
    bench.put("stuck.jpg", draw(1).jpeg)
    bench.put("fine.jpg", draw(2).jpeg)
    stuck = hashlib.sha256(draw(1).jpeg).hexdigest()

    async def script(image: PreparedImage, detail: Detail) -> Assessment:
        if image.sha256 == stuck:
            await asyncio.sleep(600)
        return await says_safe(image, detail)

    bench.guard.script = script
    await bench.submit({"id": "stuck", "uri": "s3://uploads/stuck.jpg"})
    intake = await bench.start(blocked_deadline_s=0.1)
    transport = intake.live.consumer
    transport.blocked = lambda: [w.message for w in intake.live.in_flight.values()]  # type: ignore[method-assign]
    await asyncio.sleep(2.5)
    assert await bench.verdicts() == [], "alone, it may be an outage"
    for number in range(60):
        await bench.submit({"id": str(number), "uri": "s3://uploads/fine.jpg"}, key=str(number).encode())
    verdicts, letters = await bench.settled(61)
    assert letters == []
    (blocked,) = [verdict for verdict in verdicts if verdict.submission_id == "stuck"]
    assert (blocked.outcome, blocked.reason, blocked.action) == ("needs_review", "blocked", "review")


async def test_failed_settle_after_deadline_backs_off(bench: Bench) -> None:
    bench.put("refused.jpg")
    intake = await bench.start()
    lane, tries = intake.live, 0

    async def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        for held in lane.in_flight.values():
            held.expire()
        raise ConfigurationError("too large")

    settle, lane.consumer.settle = lane.consumer.settle, refuse  # type: ignore[method-assign]
    await bench.submit({"id": "1", "uri": "s3://uploads/refused.jpg"})
    await asyncio.sleep(2.5)
    assert 1 <= tries <= 3
    lane.consumer.settle = settle  # type: ignore[method-assign]
    assert len((await bench.settled(1))[0]) == 1


async def test_slow_submission_expires_once_others_succeed(bench: Bench) -> None:
    bench.put("stuck.jpg", draw(1).jpeg)
    bench.put("fine.jpg", draw(2).jpeg)
    stuck = hashlib.sha256(draw(1).jpeg).hexdigest()

    async def script(image: PreparedImage, detail: Detail) -> Assessment:
        if image.sha256 == stuck:
            raise GuardUnavailable("hangs")
        return await says_safe(image, detail)

    bench.guard.script = script
    for number in range(60):
        await bench.submit({"id": str(number), "uri": "s3://uploads/fine.jpg"}, key=str(number).encode())
    await bench.submit({"id": "stuck", "uri": "s3://uploads/stuck.jpg"})
    await bench.start(judge_deadline_s=2)
    _, (letter,) = await bench.settled(61)
    assert (letter.submission_id, letter.reason) == ("stuck", "expired")


def created(key: str, sequencer: str = "0A") -> dict[str, Any]:
    s3 = {"bucket": {"name": "uploads"}, "object": {"key": key, "sequencer": sequencer}}
    return {"eventName": "ObjectCreated:Put", "s3": s3}


async def test_a_change_of_policy_under_load_reaches_every_later_submission(bench: Bench) -> None:
    bench.put("load.jpg")
    for number in range(5):
        bench.registry.publish(PolicyDocument(name="default", description=f"number {number}"))
    await bench.start()
    active: list[tuple[datetime, int]] = [(datetime.min.replace(tzinfo=UTC), 1)]

    async def change() -> None:
        for version in (2, 3, 1, 4, 5, 6):
            await asyncio.sleep(0.7)
            done = await asyncio.to_thread(bench.registry.activate, "default", version, who="ann")
            await bench.shared.publish_change("default", done)
            active.append((datetime.now(UTC), version))

    async def load() -> None:
        for number in range(250):
            await bench.submit({"id": str(number), "uri": "s3://uploads/load.jpg"}, key=str(number).encode())
            await asyncio.sleep(0.02)

    await asyncio.gather(change(), load())
    verdicts, letters = await bench.settled(250)
    assert (len(verdicts), letters) == (250, [])
    for verdict in verdicts:
        received = verdict.submitted_at + timedelta(milliseconds=verdict.timings_ms.queued)
        # What was active a second before, and each change since; one is noted here a little after it is made.
        long_ago, just_now = received - timedelta(seconds=1), received + timedelta(seconds=0.2)
        allowed = {version for at, version in active if long_ago < at <= just_now}
        allowed.add(next(version for at, version in reversed(active) if at <= long_ago))
        assert verdict.policy is not None
        assert verdict.policy.version in allowed
    assert len({verdict.policy.version for verdict in verdicts if verdict.policy}) >= 5


async def test_judging_again_gives_the_same_verdict_id(bench: Bench) -> None:
    await bench.start()
    bench.put("again.jpg")
    for _ in range(2):
        await bench.submit({"id": "again", "uri": "s3://uploads/again.jpg"})
    verdicts, _ = await bench.settled(2)
    assert len({verdict.verdict_id for verdict in verdicts}) == 1
