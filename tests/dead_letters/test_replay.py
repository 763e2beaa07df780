"""Dead letters listed and put back: each once, whatever dies when, and nothing of a submission is lost on the way."""

import asyncio
import json
import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dead_letters import replay as dead_letters
from pipelines.dead_letters.replay import Replayed, Selection, StoredDeadLetter, read_letter
from pipelines.dead_letters.replay_log import ReplayLog
from services.core.errors import ConfigurationError, StreamUnavailable, Unavailable
from services.core.messages import DeadLetter, attempts_before, producer_headers
from services.core.settings import Settings
from services.streams.base import Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.cli.test_command_line import fails, folder, sluice
from tests.end_to_end.outside import SLUICE
from tests.support.intake_bench import Bench

__all__ = ["folder"]

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)
CLOUD_EVENT = {"ce_specversion": b"1.0", "ce_type": b"upload", "ce_id": b"e-1", "content-type": b"application/json"}


def letter(**fields: Any) -> DeadLetter:
    defaults = {"reason": "not_found", "detail": "no such key", "attempts": 1, "source": "s/0/1", "failed_at": NOW}
    return DeadLetter(**(defaults | fields))


def message(value: bytes, dead: DeadLetter | None, *headers: tuple[str, bytes]) -> Message:
    own = dead.headers() if dead else ()
    return Message(value, b"key", (*own, *headers), "sluice.dead-letters/0/7", NOW)


def found(value: bytes | dict[str, Any], **fields: Any) -> StoredDeadLetter:
    result = read_letter(message(value if isinstance(value, bytes) else json.dumps(value).encode(), letter(**fields)))
    assert result is not None
    return result


async def replay(
    settings: Settings, selection: Selection | None = None, **options: Any
) -> tuple[Replayed, list[StoredDeadLetter]]:
    back: list[StoredDeadLetter] = []
    arguments: dict[str, Any] = {"limit": None, "dry_run": False, "progress": lambda _: None} | options
    done = await dead_letters.replay(settings, selection or Selection(), write=back.append, **arguments)
    return done, back


async def bury(bench: Bench, *ids: str, **fields: Any) -> None:
    """Dead letters as an intake writes them."""
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    stream = bench.settings.dead_letters_stream
    for each in ids:
        original = json.dumps({"id": each, "uri": f"s3://uploads/{each}.jpg", "tenant": "shop"}).encode()
        headers = letter(submission_id=each, **fields).headers()
        await publisher.publish([OutgoingMessage(stream, original, each.encode(), headers)])
    await publisher.close()


class TestReading:
    def test_what_the_original_says(self) -> None:
        native = found({"id": "a", "uri": "s3://b/k", "tenant": "shop"}, submission_id="a")
        assert (native.submission_id, native.tenant, native.uri) == ("a", "shop", "s3://b/k")
        nothing = found(b"\xff not json", reason="malformed")
        assert (nothing.submission_id, nothing.tenant, nothing.uri) == (None, None, None)
        assert json.loads(nothing.to_json())["uri"] is None

    def test_what_is_no_dead_letter(self) -> None:
        assert read_letter(message(b"{}", None)) is None
        assert read_letter(message(b"{}", None, ("sluice-reason", b"boredom"))) is None
        wrong_time = [(n, b"+999999-01-01" if n == "sluice-failed-at" else v) for n, v in letter().headers()]
        assert read_letter(message(b"{}", None, *wrong_time)) is None

    def test_headers_of_the_producer_are_not_mistaken_for_sluices(self) -> None:
        read = read_letter(message(b"{}", letter(), ("submission_id", b"x"), ("reason", b"y"), ("detail", b"z")))
        assert read is not None
        assert read.letter == letter()

    @given(st.binary(max_size=80), st.text(max_size=20), st.text(max_size=40))
    def test_hostile_text_is_harmless_in_a_terminal(self, value: bytes, name: str, detail: str) -> None:
        for each in (
            found(value, detail=detail, submission_id=name),
            found({"id": f"\x1b[2J{name}"[:256], "uri": f"s3://b/\u202e\r\n{name}"}, detail=f"\x1b]0;{detail}\a"),
        ):
            assert each.line().isprintable()
            assert len(each.to_json().splitlines()) == 1
            assert each.to_json().isascii()


class TestSelection:
    @pytest.mark.parametrize(
        ("selection", "taken"),
        [
            (Selection(), True),
            (Selection(reasons=["not_found", "expired"]), True),
            (Selection(reasons=["expired"]), False),
            (Selection(tenant="shop"), True),
            (Selection(tenant="other"), False),
            (Selection(older_than=NOW + timedelta(seconds=1)), True),
            (Selection(older_than=NOW), False),
            (Selection(newer_than=NOW - timedelta(seconds=1)), True),
            (Selection(newer_than=NOW), False),
            (Selection(ids={"a", "b"}), True),
            (Selection(ids={"b"}), False),
            (Selection(tenant="shop", ids={"b"}), False),
        ],
    )
    def test_conditions(self, selection: Selection, taken: bool) -> None:
        assert selection.takes(found({"id": "a", "uri": "s3://b/k", "tenant": "shop"})) is taken


def test_attempts_of_submissions_that_were_replayed() -> None:
    replayed = ("sluice-replayed-from", b"x/0/1")
    assert attempts_before([replayed, ("sluice-attempts", b"3")]) == 3
    assert attempts_before([("Sluice-Attempts", b"3"), ("Sluice-Replayed-From", b"x")]) == 3
    assert attempts_before([("sluice-attempts", b"3")]) == 0, "only a replay counts on"
    for wrong in (b"", b"-1", b"x", b"9" * 5000, "٣".encode()):
        assert attempts_before([replayed, ("sluice-attempts", wrong)]) == 0
    assert producer_headers([("ce_id", b"1"), ("Sluice-Reason", b"x"), replayed]) == (("ce_id", b"1"),)


async def test_a_dead_letter_goes_back_whole_and_its_attempts_count_on(bench: Bench) -> None:
    await bench.start()
    native = {"id": "late", "uri": "s3://uploads/not-yet.jpg"}
    forged = {"sluice-reason": b"forged", "Sluice-Attempts": b"99"}
    await bench.submit(native, b"its own key", **CLOUD_EVENT, **forged)
    await bench.settled(1)
    (dead,) = await bench.read(bench.settings.dead_letters_stream)
    assert dict(producer_headers(dead.headers)) == CLOUD_EVENT
    assert {dead.header("Sluice-Attempts"), dead.header("sluice-attempts")} == {b"1"}

    done, back = await replay(bench.settings)
    assert (done, len(back)) == (Replayed(replayed=1), 1)
    await bench.settled(2)
    original, again = await bench.read(bench.settings.submissions_stream)
    assert (again.value, again.key) == (original.value, original.key)
    assert dict(producer_headers(again.headers)) == CLOUD_EVENT
    assert again.header("sluice-replayed-from") == dead.source.encode()
    letters = await bench.letters()
    assert [(each.submission_id, each.reason, each.attempts) for each in letters] == [
        ("late", "not_found", 1),
        ("late", "not_found", 2),
    ]

    bench.put("not-yet.jpg")
    done, _ = await replay(bench.settings)
    assert done == Replayed(replayed=1, before=1)
    (verdict,), letters = await bench.settled(3)
    assert (verdict.submission_id, len(letters)) == ("late", 2)
    done, back = await replay(bench.settings)
    assert (done, back) == (Replayed(before=2), [])


async def test_one_record_of_several_goes_back_alone(bench: Bench) -> None:
    await bench.start()
    bench.put("here.jpg")
    records = [
        {
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "uploads"}, "object": {"key": key, "sequencer": "01"}},
        }
        for key in ("here.jpg", "comes-later.jpg")
    ]
    await bench.submit({"Records": records}, **CLOUD_EVENT)
    await bench.settled(2)
    bench.put("comes-later.jpg")
    await replay(bench.settings)
    verdicts, _ = await bench.settled(3)
    assert sorted(each.submission_id for each in verdicts) == ["uploads/comes-later.jpg#01", "uploads/here.jpg#01"]


async def test_bytes_that_are_no_submission_go_back_as_they_are(bench: Bench) -> None:
    await bench.start()
    await bench.submit(b"\xff\x00 not json", x_trace=b"\xff\x00")
    await bench.settled(1)
    await replay(bench.settings, Selection(reasons=["malformed"]))
    await bench.settled(2)
    first, second = await bench.read(bench.settings.dead_letters_stream)
    assert (second.value, second.key, second.header("x_trace")) == (first.value, None, b"\xff\x00")
    assert second.header("sluice-attempts") == b"2"


async def test_killed_between_publication_and_mark(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bury(bench, "a", "b")
    keep = ReplayLog.add

    async def die(self: ReplayLog, marks: Any) -> None:
        if list(marks):
            raise Unavailable("killed")

    monkeypatch.setattr(ReplayLog, "add", die)
    with pytest.raises(Unavailable):
        await replay(bench.settings)
    monkeypatch.setattr(ReplayLog, "add", keep)
    assert len(await bench.read(bench.settings.submissions_stream)) == 2
    assert (await replay(bench.settings))[0] == Replayed(before=2)
    assert len(await bench.read(bench.settings.submissions_stream)) == 2

    with redis.Redis.from_url(bench.settings.stream_url) as client:
        client.xtrim(bench.settings.submissions_stream, maxlen=0, approximate=False)
    assert (await replay(bench.settings))[0] == Replayed(before=2), "the marks outlive the submissions"


async def test_killed_at_any_moment(bench: Bench, folder: Path) -> None:
    """The real command, by SIGKILL, while it publishes."""
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    stream = bench.settings.dead_letters_stream
    originals = [json.dumps({"id": str(each), "uri": "s3://uploads/x.jpg"}).encode() for each in range(3000)]
    await publisher.publish([OutgoingMessage(stream, each, None, letter().headers()) for each in originals])
    await publisher.close()
    command = await asyncio.create_subprocess_exec(
        SLUICE, "dead-letters", "replay", cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert command.stdout is not None
    await command.stdout.readline()
    command.kill()
    await command.wait()
    published = len(await bench.read(bench.settings.submissions_stream))
    assert 0 < published < len(originals)
    done = await asyncio.to_thread(sluice, "dead-letters", "replay", folder=folder)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, len(originals) - published)
    assert "was killed: waiting" in done.stderr.decode()
    replayed = [each.value for each in await bench.read(bench.settings.submissions_stream)]
    assert replayed == originals


async def test_redis_lost_its_data(bench: Bench) -> None:
    await bury(bench, "a")
    await replay(bench.settings)
    with redis.Redis.from_url(bench.settings.redis_url) as client:
        assert client.delete(f"sluice:{bench.settings.dead_letters_stream}:replayed") == 1
    assert (await replay(bench.settings))[0] == Replayed(before=1)


async def test_only_the_half_that_was_not_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bury(bench, *"abcd")
    monkeypatch.setattr(dead_letters, "_BATCH", 2)
    opened = open_publisher

    async def failing(settings: Settings) -> Any:
        publisher = await opened(settings)
        publish, calls = publisher.publish, []

        async def once(records: Any) -> None:
            calls.append(records)
            if len(calls) > 1:
                raise StreamUnavailable("away")
            await publish(records)

        monkeypatch.setattr(publisher, "publish", once)
        return publisher

    monkeypatch.setattr(dead_letters, "open_publisher", failing)
    back: list[StoredDeadLetter] = []
    with pytest.raises(StreamUnavailable):
        await dead_letters.replay(
            bench.settings, Selection(), limit=None, dry_run=False, write=back.append, progress=print
        )
    assert [each.submission_id for each in back] == ["a", "b"]
    monkeypatch.setattr(dead_letters, "open_publisher", opened)
    done, back = await replay(bench.settings)
    assert (done, [each.submission_id for each in back]) == (Replayed(replayed=2, before=2), ["c", "d"])
    values = [json.loads(each.value)["id"] for each in await bench.read(bench.settings.submissions_stream)]
    assert values == list("abcd"), "oldest first"


async def test_two_commands_at_once(bench: Bench) -> None:
    await bury(bench, *"abc")
    waited: list[str] = []
    results = await asyncio.gather(*(replay(bench.settings, progress=waited.append) for _ in range(3)))
    assert sorted(done.replayed for done, _ in results) == [0, 0, 3]
    assert len(await bench.read(bench.settings.submissions_stream)) == 3
    assert any("another replay" in line for line in waited)


async def test_a_producer_cannot_keep_a_dead_letter_from_being_replayed(bench: Bench) -> None:
    await bury(bench, "a")
    (dead,) = await bench.read(bench.settings.dead_letters_stream)
    await bench.submit({"id": "mine", "uri": "s3://uploads/x.jpg"}, **{"sluice-replayed-from": dead.source.encode()})
    assert (await replay(bench.settings))[0] == Replayed(replayed=1)


async def test_backfill_goes_back_to_backfill(bench: Bench) -> None:
    settings = bench.settings
    await bury(bench, "slow", source=f"{settings.backfill_stream}/1-0")
    await bury(bench, "live", source=f"{settings.submissions_stream}/1-0")
    assert (await replay(settings, Selection(ids={"live", "slow"})))[0].replayed == 2
    live = [json.loads(each.value)["id"] for each in await bench.read(settings.submissions_stream)]
    slow = [json.loads(each.value)["id"] for each in await bench.read(settings.backfill_stream)]
    assert (live, "slow" in slow) == (["live"], True)
    assert (await replay(settings))[0] == Replayed(before=2)


async def test_limit_dry_run_and_an_id_that_is_not_there(bench: Bench) -> None:
    await bury(bench, *"abc")
    done, back = await replay(bench.settings, limit=2, dry_run=True)
    assert (done.replayed, [each.submission_id for each in back]) == (2, ["a", "b"])
    assert await bench.read(bench.settings.submissions_stream) == []
    assert (await replay(bench.settings, limit=1))[0] == Replayed(replayed=1)
    assert [each.submission_id for each in (await replay(bench.settings, limit=1))[1]] == ["b"]
    with pytest.raises(ConfigurationError, match="belongs to nobody; nothing was replayed"):
        await replay(bench.settings, Selection(ids={"c", "nobody"}))
    assert (await replay(bench.settings, Selection(ids={"a", "c"})))[0] == Replayed(replayed=1, before=1)


async def test_from_outside(bench: Bench, folder: Path) -> None:
    await bury(bench, "evil\x1b[31m", reason="forbidden", detail="no\x1b]0;x\a way")
    await bury(bench, "plain", failed_at=datetime.now(UTC))
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    await publisher.publish([OutgoingMessage(bench.settings.dead_letters_stream, b"not ours")])
    await publisher.close()

    listed = sluice("dead-letters", "list", folder=folder)
    lines = listed.stdout.decode().splitlines()
    assert (listed.returncode, len(lines)) == (0, 2)
    assert "\x1b" not in listed.stdout.decode()
    assert all(word in lines[0] for word in ("forbidden", "x1", "shop", "s3://uploads/evil", "s/0/1"))
    assert "1 messages" in listed.stderr.decode()
    rows = [json.loads(line) for line in sluice("dead-letters", "list", "--json", folder=folder).stdout.splitlines()]
    assert rows[0].keys() == {
        *("dead_letter", "submission_id", "reason", "detail", "attempts", "source", "failed_at", "tenant", "uri")
    }
    recent = sluice("dead-letters", "list", "--newer-than", "1h", "--tenant", "shop", "--json", folder=folder)
    assert [json.loads(line)["submission_id"] for line in recent.stdout.splitlines()] == ["plain"]

    fails(sluice("dead-letters", "list", "--reason", "boredom", folder=folder), "boredom", "not_found")
    fails(sluice("dead-letters", "list", "--older-than", "soon", folder=folder), "'soon' is neither")
    fails(sluice("dead-letters", "replay", "--id", "absent\x1b", folder=folder), "belongs to absent\ufffd")
    fails(sluice("dead-letters", "replay", folder=folder, SLUICE_REDIS_URL="redis://127.0.0.1:9/0"), "SLUICE_REDIS_URL")
    fails(sluice("dead-letters", "list", folder=folder, SLUICE_STREAM_URL="redis://x:bad"), "SLUICE_STREAM_URL")

    done = sluice("dead-letters", "replay", "--reason", "not_found", "--json", folder=folder)
    assert (done.returncode, json.loads(done.stdout)["submission_id"]) == (0, "plain")
    again = sluice("dead-letters", "replay", "--reason", "not_found", "--json", folder=folder)
    assert (again.returncode, again.stdout) == (0, b"")
    assert "left alone" in again.stderr.decode()


@pytest.mark.kafka
async def test_on_kafka(bench: Bench, kafka_address: str) -> None:
    """What differs there: positions, headers that are the record's own, and a stream that refuses what is too large."""
    name = f"replay-{uuid.uuid4().hex[:8]}"
    bench.settings = bench.settings.model_copy(
        update={
            "stream_url": f"kafka://{kafka_address}",
            "kafka_partitions": 3,
            "backfill_stream": f"{name}.backfill",
        }
    )
    await bench.start()
    await bench.submit({"id": "late", "uri": "s3://uploads/kafka-late.jpg"}, b"k", **CLOUD_EVENT)
    await bench.submit(b"not json")
    await bench.settled(2, within_s=90)
    bench.put("kafka-late.jpg")
    done, back = await replay(bench.settings, Selection(ids={"late"}))
    assert (done, [each.message.key for each in back]) == (Replayed(replayed=1), [b"k"])
    (verdict,), letters = await bench.settled(3, within_s=60)
    assert (verdict.submission_id, len(letters)) == ("late", 2)
    again = [each for each in await bench.read(bench.settings.submissions_stream) if each.key == b"k"]
    assert len({each.source.rpartition("/")[0] for each in again}) == 1, "the same key, so the same partition"
    assert all(dict(producer_headers(each.headers)) == CLOUD_EVENT for each in again)
    assert (await replay(bench.settings))[0] == Replayed(replayed=1, before=1)
    _, letters = await bench.settled(4, within_s=60)
    assert sorted(each.attempts for each in letters) == [1, 1, 2]

    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    dead = letter(submission_id="huge")
    huge = OutgoingMessage(bench.settings.dead_letters_stream, os.urandom(1_200_000), b"h", dead.headers())
    small = OutgoingMessage(bench.settings.dead_letters_stream, b"small", b"h", dead.headers())
    await publisher.publish([small, huge])
    await publisher.publish([small])
    await publisher.close()
    said: list[str] = []
    done, _ = await replay(bench.settings, Selection(ids={"huge"}), progress=said.append)
    assert done == Replayed(replayed=2, refused=1)
    assert any("is not replayed: Kafka refuses a message of 1200000 bytes" in line for line in said)
