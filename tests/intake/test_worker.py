"""Submissions from the stream to their outcomes: bad input, outages, hand-over. The guard is a fake."""

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.intake import processor, worker
from pipelines.tiny_guard.drawings import draw
from services.core import telemetry
from services.core.errors import ConfigurationError, GuardFailed, GuardUnavailable, StoreUnavailable, UnreadableAnswer
from services.core.values import Assessment, Detail, PreparedImage, Priority
from services.policies.document import PolicyDocument
from services.policies.registry import PolicyRegistry
from services.streams.base import Lag
from tests.end_to_end.corpus import bad_input, events
from tests.support.fake_guard import MODEL, says_safe
from tests.support.intake_bench import IntakeBench
from tests.support.servers import Valkey
from tests.support.streams_bench import eventually


async def test_bad_input_ends_as_a_dead_letter_with_its_reason(bench: IntakeBench) -> None:
    await bench.start()
    cases = [*bad_input(bench.put), *events(bench.put)]
    for case in cases:
        await bench.submit(case.value, case.key, **case.headers)
    expected = Counter(case.end for case in cases if case.end != "nothing")
    verdicts, letters = await bench.settled(expected.total())
    assert Counter(letter.reason for letter in letters) + Counter(verdict=len(verdicts)) == expected
    originals = Counter(message.value for message in await bench.read(bench.settings.dead_letters_stream))
    assert originals == Counter(case.value for case in cases if case.end not in ("verdict", "nothing"))


async def test_message_with_several_records_has_an_outcome_for_each(bench: IntakeBench) -> None:
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


async def test_answer_unreadable_twice_needs_review(bench: IntakeBench) -> None:
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


async def test_answer_readable_the_second_time_is_a_verdict(bench: IntakeBench) -> None:
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


async def test_image_that_the_engine_refuses_is_a_dead_letter(bench: IntakeBench) -> None:
    async def refuse(_image: PreparedImage, _detail: Detail) -> Assessment:
        raise GuardFailed("the engine refuses it")

    bench.guard.script = refuse
    await bench.start()
    bench.put("refused.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/refused.jpg"})
    _, (letter,) = await bench.settled(1)
    assert (letter.reason, letter.submission_id) == ("guard_failed", "a")


async def test_first_look_at_a_clearly_safe_image_is_the_verdict(bench: IntakeBench) -> None:
    registry = PolicyRegistry(bench.s3, bench.settings.policy_bucket)
    registry.publish(PolicyDocument(name="quick", effort="adaptive", first_look_below=0.1))
    registry.activate("quick", 1, who="test")
    await bench.start()
    bench.put("quick.jpg")
    await bench.submit({"id": "a", "uri": "s3://uploads/quick.jpg", "policy": "quick"})
    (verdict,), _ = await bench.settled(1)
    assert (verdict.effort, verdict.category, verdict.rationale) == ("first_look", "NA: None applying", None)
    assert bench.guard.calls == ["score"]


async def test_first_look_at_a_doubtful_image_is_followed_by_a_full_one(bench: IntakeBench) -> None:
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


async def test_guard_outage_delays_the_verdict(bench: IntakeBench) -> None:
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


async def test_image_with_access_denied_is_a_dead_letter(bench: IntakeBench) -> None:
    """The S3 server of the other tests denies nothing, so this intake has a server that answers AccessDenied."""
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


async def test_store_outage_delays_the_verdict(bench: IntakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first, nothing listens on the port of the intake's S3 server."""
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

    retries: list[BaseException | None] = []
    monkeypatch.setattr(telemetry, "count_retry", retries.append)
    reserved = await asyncio.start_server(forward, "127.0.0.1", 0)
    port = reserved.sockets[0].getsockname()[1]
    reserved.close()
    await bench.start(endpoint=f"http://127.0.0.1:{port}")
    await bench.submit({"id": "a", "uri": "s3://uploads/late.jpg"})

    async def was_retried_twice() -> bool:
        return len(retries) >= 2

    await eventually(was_retried_twice)
    assert {type(error) for error in retries} == {StoreUnavailable}
    assert (await bench.verdicts(), await bench.letters()) == ([], [])
    async with await asyncio.start_server(forward, "127.0.0.1", port):
        verdicts, letters = await bench.settled(1)
    assert ([verdict.submission_id for verdict in verdicts], letters) == (["a"], [])


async def test_stream_outage_loses_no_submission(
    bench: IntakeBench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    valkey = Valkey(tmp_path / "valkey")
    valkey.start()
    bench.settings = bench.settings.model_copy(update={"stream_url": valkey.url})
    try:
        judging, release = asyncio.Event(), asyncio.Event()

        async def hold(image: PreparedImage, detail: Detail) -> Assessment:
            judging.set()
            await release.wait()
            return await says_safe(image, detail)

        bench.guard.script = hold
        await bench.start()
        for number in range(5):
            bench.put(f"{number}.jpg")
            await bench.submit({"id": str(number), "uri": f"s3://uploads/{number}.jpg"})
        await judging.wait()
        valkey.kill()
        release.set()

        async def outage_is_noticed() -> bool:
            return "Redis does not answer; retrying" in caplog.text

        await eventually(outage_is_noticed)
        valkey.start()
        verdicts, letters = await bench.settled(5)
        assert (sorted(verdict.submission_id for verdict in verdicts), letters) == (list("01234"), [])
        await bench.close()
    finally:
        valkey.kill()


async def test_message_unfinished_at_the_drain_goes_to_the_next_member(bench: IntakeBench) -> None:
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


async def test_member_with_a_swallowed_cancellation_still_leaves(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py swallows a cancellation in Python 3.11 if it has just sent a command."""
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
    while not closing.done():  # so that a member that stays makes this test fail and not hang
        for task in took:
            task.cancel()
        await sleep(0.05)
    assert took
    assert left


async def test_drain_with_a_cancelled_caller_goes_on(bench: IntakeBench) -> None:
    intake = await bench.start()
    asked = asyncio.create_task(intake.drain())
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, intake.drain(), return_exceptions=True)
    assert asked.cancelled()
    assert intake.live.consumer._closed  # type: ignore[attr-defined]


async def test_lag_that_cannot_be_read_is_missing_until_it_can(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_submissions_in_flight_stay_within_the_limit(bench: IntakeBench) -> None:
    in_flight, most, together = 0, 0, asyncio.Barrier(4)

    async def wait_for_three_others(image: PreparedImage, detail: Detail) -> Assessment:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await together.wait()
        in_flight -= 1
        return await says_safe(image, detail)

    bench.guard.script = wait_for_three_others
    for number in range(28):
        bench.put(f"many-{number}.jpg")
    await bench.submit({"Records": [created(f"many-{number}.jpg") for number in range(28)]})
    for number in range(12):
        await bench.submit({"id": str(number), "uri": f"s3://uploads/many-{number}.jpg"})
    await bench.start(in_flight=4)
    verdicts, letters = await bench.settled(40)
    assert (len(verdicts), letters) == (40, [])
    assert most == 4


async def test_submissions_with_one_key_are_judged_in_order_and_others_beside_them(bench: IntakeBench) -> None:
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


async def test_overtaken_event_is_superseded(bench: IntakeBench) -> None:
    bench.put("again.jpg")
    for sequencer in ("0A", "0C", "0B"):
        await bench.submit({"Records": [created("again.jpg", sequencer)]})
    await bench.start()
    verdicts, letters = await bench.settled(3)
    outcomes = {verdict.submission_id.partition("#")[2]: verdict for verdict in verdicts}
    assert {sequencer: verdict.outcome for sequencer, verdict in outcomes.items()} == {
        "0A": "superseded",
        "0B": "superseded",
        "0C": "verdict",
    }
    assert letters == []
    assert outcomes["0A"].action is None
    assert outcomes["0A"].rating is None


async def test_backfill_is_judged_with_its_own_priority(bench: IntakeBench) -> None:
    priorities: Counter[str] = Counter()
    assess_each = bench.guard.assess_each

    async def count(image: PreparedImage, policies: Any, detail: Detail, priority: Priority) -> list[Assessment]:
        priorities[priority] += 1
        return await assess_each(image, policies, detail, priority)

    bench.guard.assess_each = count  # type: ignore[method-assign]
    for number in range(40):
        bench.put(f"{number}.jpg", draw(number).jpeg)
        await bench.submit(
            {"id": str(number), "uri": f"s3://uploads/{number}.jpg"},
            stream=bench.settings.backfill_stream if number < 20 else bench.settings.submissions_stream,
        )
    await bench.start(in_flight=4, with_backfill=True)
    verdicts, letters = await bench.settled(40)
    assert (len(verdicts), letters) == (40, [])
    assert priorities == {"live": 20, "backfill": 20}


async def test_systemic_error_does_not_empty_the_stream(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "_SYSTEMIC_ERRORS_IN_A_ROW", 5)
    monkeypatch.setattr(processor, "_SYSTEMIC_RETRY_S", 0.1)
    for number in range(20):
        await bench.submit({"id": str(number), "uri": f"s3://uploads/{bench.settings.group}/{number}.jpg"})
    await bench.start()

    async def every_other_submission_was_retried() -> bool:
        return caplog.text.count("too many submissions fail, maybe for a common cause") >= 30

    await eventually(every_other_submission_was_retried)
    assert len(await bench.letters()) == 5
    for number in range(20):
        bench.put(f"{bench.settings.group}/{number}.jpg")
    verdicts, letters = await bench.settled(20)
    assert (len(verdicts), len(letters)) == (15, 5)


async def test_blocking_submission_needs_review_once_others_succeed(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_WATCH_INTERVAL_S", 0.05)
    bench.put("stuck.jpg", draw(1).jpeg)
    bench.put("fine.jpg", draw(2).jpeg)
    stuck = hashlib.sha256(draw(1).jpeg).hexdigest()

    async def hang_at_one_image(image: PreparedImage, detail: Detail) -> Assessment:
        if image.sha256 == stuck:
            await asyncio.Event().wait()
        return await says_safe(image, detail)

    bench.guard.script = hang_at_one_image
    await bench.submit({"id": "stuck", "uri": "s3://uploads/stuck.jpg"})
    intake = await bench.start(blocked_deadline_s=0.1)
    consumer = intake.live.consumer
    consumer.find_head_of_line_messages = lambda: [held.message for held in intake.live.in_flight.values()]  # type: ignore[method-assign]
    for number in range(60):
        await bench.submit({"id": str(number), "uri": "s3://uploads/fine.jpg"}, key=str(number).encode())
    verdicts, letters = await bench.settled(61)
    assert letters == []
    (blocked,) = [verdict for verdict in verdicts if verdict.submission_id == "stuck"]
    assert (blocked.outcome, blocked.reason, blocked.action) == ("needs_review", "blocked", "review")


def created(key: str, sequencer: str = "0A") -> dict[str, Any]:
    s3 = {"bucket": {"name": "uploads"}, "object": {"key": key, "sequencer": sequencer}}
    return {"eventName": "ObjectCreated:Put", "s3": s3}


async def test_policy_change_under_load_applies_to_every_later_submission(bench: IntakeBench) -> None:
    """Submissions before the change may have either version; once the intake has the change, only the new one."""
    bench.put("load.jpg")
    for number in range(5):
        bench.registry.publish(PolicyDocument(name="default", description=f"number {number}"))
    await bench.start()
    allowed: dict[str, set[int]] = {}

    async def submit(count: int, versions: set[int]) -> None:
        for _ in range(count):
            name = str(len(allowed))
            allowed[name] = versions
            await bench.submit({"id": name, "uri": "s3://uploads/load.jpg"}, key=name.encode())

    old = 1
    await submit(10, {old})
    await bench.settled(10)
    for new in (2, 3, 1, 4, 5, 6):
        during: set[int] = {old, new}
        loading = asyncio.create_task(submit(10, during))
        change = await asyncio.to_thread(bench.registry.activate, "default", new, who="ann")
        await bench.redis_cache.publish_change("default", change)

        async def intake_has_the_change(version: int = new) -> bool:
            return (await bench.policies.get_rollout("default")).active == version

        await eventually(intake_has_the_change, within_s=2)
        await loading
        await submit(10, {new})
        await bench.settled(len(allowed))
        old = new
    verdicts, letters = await bench.settled(len(allowed))
    assert (len(verdicts), letters) == (130, [])
    for verdict in verdicts:
        assert verdict.policy is not None
        assert verdict.policy.version in allowed[verdict.submission_id]


async def test_submission_judged_again_has_the_same_verdict_id(bench: IntakeBench) -> None:
    await bench.start()
    bench.put("again.jpg")
    for _ in range(2):
        await bench.submit({"id": "again", "uri": "s3://uploads/again.jpg"})
    verdicts, _ = await bench.settled(2)
    assert len({verdict.verdict_id for verdict in verdicts}) == 1
