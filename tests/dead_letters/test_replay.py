"""List and replay dead letters: each is replayed once and unchanged, also after a crash."""

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
from pipelines.dead_letters.replay import ReplayCounts
from pipelines.dead_letters.replay_log import ReplayLog
from pipelines.dead_letters.stored import Selection, StoredDeadLetter, parse_dead_letter
from services.core.errors import ConfigurationError, StreamUnavailable, Unavailable
from services.core.messages import DeadLetter, remove_own_headers
from services.core.settings import Settings
from services.streams.base import Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.support.command_line import SLUICE, assert_fails, run_sluice_in
from tests.support.intake_bench import IntakeBench

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)
CLOUD_EVENT = {"ce_specversion": b"1.0", "ce_type": b"upload", "ce_id": b"e-1", "content-type": b"application/json"}


def letter(**fields: Any) -> DeadLetter:
    defaults = {"reason": "not_found", "detail": "no such key", "attempts": 1, "source": "s/0/1", "failed_at": NOW}
    return DeadLetter(**(defaults | fields))


def message(value: bytes, dead: DeadLetter | None, *headers: tuple[str, bytes]) -> Message:
    own = dead.headers() if dead else ()
    return Message(value, b"key", (*own, *headers), "sluice.dead-letters/0/7", NOW)


def found(value: bytes | dict[str, Any], **fields: Any) -> StoredDeadLetter:
    result = parse_dead_letter(
        message(value if isinstance(value, bytes) else json.dumps(value).encode(), letter(**fields))
    )
    assert result is not None
    return result


async def replay(
    settings: Settings, selection: Selection | None = None, **options: Any
) -> tuple[ReplayCounts, list[StoredDeadLetter]]:
    replayed: list[StoredDeadLetter] = []
    arguments: dict[str, Any] = {"limit": None, "dry_run": False, "progress": lambda _: None} | options
    counts = await dead_letters.replay(settings, selection or Selection(), write=replayed.append, **arguments)
    return counts, replayed


async def publish_dead_letters(bench: IntakeBench, *ids: str, **fields: Any) -> None:
    """Publish dead letters as intake writes them."""
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    stream = bench.settings.dead_letters_stream
    for each in ids:
        original = json.dumps({"id": each, "uri": f"s3://uploads/{each}.jpg", "tenant": "shop"}).encode()
        headers = letter(submission_id=each, **fields).headers()
        await publisher.publish([OutgoingMessage(stream, original, each.encode(), headers)])
    await publisher.close()


class TestParsing:
    def test_dead_letter_reads_id_tenant_and_uri_from_the_original_message(self) -> None:
        native = found({"id": "a", "uri": "s3://b/k", "tenant": "shop"}, submission_id="a")
        assert (native.submission_id, native.tenant, native.uri) == ("a", "shop", "s3://b/k")
        nothing = found(b"\xff not json", reason="malformed")
        assert (nothing.submission_id, nothing.tenant, nothing.uri) == (None, None, None)
        assert json.loads(nothing.to_json())["uri"] is None

    def test_message_that_sluice_did_not_write_is_no_dead_letter(self) -> None:
        assert parse_dead_letter(message(b"{}", None)) is None
        assert parse_dead_letter(message(b"{}", None, ("sluice-reason", b"boredom"))) is None
        wrong_time = [(n, b"+999999-01-01" if n == "sluice-failed-at" else v) for n, v in letter().headers()]
        assert parse_dead_letter(message(b"{}", None, *wrong_time)) is None

    def test_producer_headers_with_similar_names_are_ignored(self) -> None:
        read = parse_dead_letter(message(b"{}", letter(), ("submission_id", b"x"), ("reason", b"y"), ("detail", b"z")))
        assert read is not None
        assert read.letter == letter()

    @given(st.binary(max_size=80), st.text(max_size=20), st.text(max_size=40))
    def test_hostile_text_is_escaped_in_output(self, value: bytes, name: str, detail: str) -> None:
        for each in (
            found(value, detail=detail, submission_id=name),
            found({"id": f"\x1b[2J{name}"[:256], "uri": f"s3://b/\u202e\r\n{name}"}, detail=f"\x1b]0;{detail}\a"),
        ):
            assert each.line().isprintable()
            assert len(each.to_json().splitlines()) == 1
            assert each.to_json().isascii()


class TestSelection:
    @pytest.mark.parametrize(
        ("selection", "matches"),
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
    def test_selection_matches_only_if_every_condition_holds(self, selection: Selection, matches: bool) -> None:
        assert selection.matches(found({"id": "a", "uri": "s3://b/k", "tenant": "shop"})) is matches


def test_own_headers_of_producers_are_removed() -> None:
    forged = [("Sluice-Reason", b"x"), ("sluice-replayed-from", b"x/0/1"), ("SLUICE-ATTEMPTS", b"3")]
    assert remove_own_headers([("ce_id", b"1"), *forged]) == (("ce_id", b"1"),)


async def test_producer_cannot_set_the_attempts_of_a_dead_letter(bench: IntakeBench) -> None:
    await bench.start()
    submission = {"id": "first", "uri": "s3://uploads/absent.jpg"}
    forged = {"sluice-replayed-from": b"sluice.dead-letters/0-1", "sluice-attempts": b"999999"}
    await bench.submit(submission, **forged)
    await bench.settled(1)
    await replay(bench.settings)
    await bench.settled(2)
    assert [each.attempts for each in await bench.letters()] == [1, 2]

    # The header of a true replay, with another value.
    dead, _ = await bench.read(bench.settings.dead_letters_stream)
    await bench.submit(submission | {"id": "other"}, **{**forged, "sluice-replayed-from": dead.source.encode()})
    await bench.settled(3)
    assert [each.attempts for each in await bench.letters()] == [1, 2, 1]


@pytest.mark.parametrize(
    ("entry", "attempts"),
    [("7", 8), ("-7", 1), ("x", 1), ("9" * 5000, 1), ("٣", 1), ("99999999", 1_000_000)],
    ids=["a number", "negative", "no number", "long", "another digit", "large"],
)
async def test_wrong_attempts_in_redis_are_ignored_or_clamped(bench: IntakeBench, entry: str, attempts: int) -> None:
    await publish_dead_letters(bench, "a")
    await replay(bench.settings)
    with redis.Redis.from_url(bench.settings.redis_url) as client:
        (name,) = client.keys(f"sluice:{bench.settings.dead_letters_stream}:replayed-attempts:*")  # type: ignore[misc]
        assert client.ttl(name) > 0  # type: ignore[operator]
        client.set(name, entry)
    await bench.start()
    await bench.settled(1 + 1)
    assert [each.attempts for each in await bench.letters()] == [1, attempts]


async def test_replayed_dead_letter_keeps_value_key_and_headers_and_continues_its_attempts(bench: IntakeBench) -> None:
    await bench.start()
    native = {"id": "late", "uri": "s3://uploads/not-yet.jpg"}
    forged = {"sluice-reason": b"forged", "Sluice-Attempts": b"99"}
    await bench.submit(native, b"its own key", **CLOUD_EVENT, **forged)
    await bench.settled(1)
    (dead,) = await bench.read(bench.settings.dead_letters_stream)
    assert dict(remove_own_headers(dead.headers)) == CLOUD_EVENT
    assert {dead.header("Sluice-Attempts"), dead.header("sluice-attempts")} == {b"1"}

    counts, replayed = await replay(bench.settings)
    assert (counts, len(replayed)) == (ReplayCounts(replayed=1), 1)
    await bench.settled(2)
    original, again = await bench.read(bench.settings.submissions_stream)
    assert (again.value, again.key) == (original.value, original.key)
    assert dict(remove_own_headers(again.headers)) == CLOUD_EVENT
    assert again.header("sluice-replayed-from") == dead.source.encode()
    letters = await bench.letters()
    assert [(each.submission_id, each.reason, each.attempts) for each in letters] == [
        ("late", "not_found", 1),
        ("late", "not_found", 2),
    ]

    bench.put("not-yet.jpg")
    counts, _ = await replay(bench.settings)
    assert counts == ReplayCounts(replayed=1, already_replayed=1)
    (verdict,), letters = await bench.settled(3)
    assert (verdict.submission_id, len(letters)) == ("late", 2)
    counts, replayed = await replay(bench.settings)
    assert (counts, replayed) == (ReplayCounts(already_replayed=2), [])


async def test_dead_letter_of_one_record_replays_only_that_record(bench: IntakeBench) -> None:
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


async def test_malformed_message_is_replayed_unchanged(bench: IntakeBench) -> None:
    await bench.start()
    await bench.submit(b"\xff\x00 not json", x_trace=b"\xff\x00")
    await bench.settled(1)
    await replay(bench.settings, Selection(reasons=["malformed"]))
    await bench.settled(2)
    first, second = await bench.read(bench.settings.dead_letters_stream)
    assert (second.value, second.key, second.header("x_trace")) == (first.value, None, b"\xff\x00")
    assert second.header("sluice-attempts") == b"2"


async def test_replay_killed_before_its_log_entry_is_not_repeated(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish_dead_letters(bench, "a", "b")
    add = ReplayLog.add

    async def fail(self: ReplayLog, replay_ids: Any) -> None:
        if list(replay_ids):
            raise Unavailable("killed")

    monkeypatch.setattr(ReplayLog, "add", fail)
    with pytest.raises(Unavailable):
        await replay(bench.settings)
    monkeypatch.setattr(ReplayLog, "add", add)
    assert len(await bench.read(bench.settings.submissions_stream)) == 2
    assert (await replay(bench.settings))[0] == ReplayCounts(already_replayed=2)
    assert len(await bench.read(bench.settings.submissions_stream)) == 2

    with redis.Redis.from_url(bench.settings.stream_url) as client:
        client.xtrim(bench.settings.submissions_stream, maxlen=0, approximate=False)
    assert (await replay(bench.settings))[0] == ReplayCounts(already_replayed=2), "the log outlives the submissions"


async def test_command_killed_while_publishing_is_continued_by_the_next(bench: IntakeBench, folder: Path) -> None:
    """Kill the real command with SIGKILL while it publishes."""
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
    done = await asyncio.to_thread(run_sluice_in, folder, "dead-letters", "replay")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, len(originals) - published)
    assert "was killed; waiting" in done.stderr.decode()
    replayed = [each.value for each in await bench.read(bench.settings.submissions_stream)]
    assert replayed == originals


async def test_replay_after_redis_lost_its_data_is_not_repeated(bench: IntakeBench) -> None:
    await publish_dead_letters(bench, "a")
    await replay(bench.settings)
    with redis.Redis.from_url(bench.settings.redis_url) as client:
        assert client.delete(f"sluice:{bench.settings.dead_letters_stream}:replayed") == 1
    assert (await replay(bench.settings))[0] == ReplayCounts(already_replayed=1)


async def test_replay_after_stream_outage_publishes_only_the_rest(
    bench: IntakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish_dead_letters(bench, *"abcd")
    monkeypatch.setattr(dead_letters, "_BATCH_SIZE", 2)
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
    replayed: list[StoredDeadLetter] = []
    with pytest.raises(StreamUnavailable):
        await dead_letters.replay(
            bench.settings, Selection(), limit=None, dry_run=False, write=replayed.append, progress=print
        )
    assert [each.submission_id for each in replayed] == ["a", "b"]
    monkeypatch.setattr(dead_letters, "open_publisher", opened)
    counts, replayed = await replay(bench.settings)
    assert (counts, [each.submission_id for each in replayed]) == (
        ReplayCounts(replayed=2, already_replayed=2),
        ["c", "d"],
    )
    values = [json.loads(each.value)["id"] for each in await bench.read(bench.settings.submissions_stream)]
    assert values == list("abcd"), "oldest first"


async def test_concurrent_commands_replay_each_dead_letter_once(bench: IntakeBench) -> None:
    await publish_dead_letters(bench, *"abc")
    waited: list[str] = []
    results = await asyncio.gather(*(replay(bench.settings, progress=waited.append) for _ in range(3)))
    assert sorted(counts.replayed for counts, _ in results) == [0, 0, 3]
    assert len(await bench.read(bench.settings.submissions_stream)) == 3
    assert any("another replay" in line for line in waited)


async def test_forged_replay_header_does_not_prevent_a_replay(bench: IntakeBench) -> None:
    await publish_dead_letters(bench, "a")
    (dead,) = await bench.read(bench.settings.dead_letters_stream)
    await bench.submit({"id": "mine", "uri": "s3://uploads/x.jpg"}, **{"sluice-replayed-from": dead.source.encode()})
    assert (await replay(bench.settings))[0] == ReplayCounts(replayed=1)


@pytest.mark.parametrize("difference", ["header", "key"])
async def test_copy_of_a_submission_that_is_judged_otherwise_does_not_prevent_a_replay(
    bench: IntakeBench, difference: str
) -> None:
    """The copy has the value of the dead letter, but becomes a dead letter itself, or another order."""
    await publish_dead_letters(bench, "a")
    (dead,) = await bench.read(bench.settings.dead_letters_stream)
    headers = {"sluice-replayed-from": dead.source.encode()}
    if difference == "header":
        await bench.submit(dead.value, dead.key, **headers, ce_specversion=b"9")
    else:
        await bench.submit(dead.value, b"another key", **headers)
    assert (await replay(bench.settings))[0] == ReplayCounts(replayed=1)
    assert (await replay(bench.settings))[0] == ReplayCounts(already_replayed=1)


async def test_dead_letter_of_backfill_is_replayed_to_backfill(bench: IntakeBench) -> None:
    settings = bench.settings
    await publish_dead_letters(bench, "slow", source=f"{settings.backfill_stream}/1-0")
    await publish_dead_letters(bench, "live", source=f"{settings.submissions_stream}/1-0")
    assert (await replay(settings, Selection(ids={"live", "slow"})))[0].replayed == 2
    live = [json.loads(each.value)["id"] for each in await bench.read(settings.submissions_stream)]
    slow = [json.loads(each.value)["id"] for each in await bench.read(settings.backfill_stream)]
    assert (live, "slow" in slow) == (["live"], True)
    assert (await replay(settings))[0] == ReplayCounts(already_replayed=2)


async def test_replay_obeys_limit_and_dry_run_and_rejects_unknown_ids(bench: IntakeBench) -> None:
    await publish_dead_letters(bench, *"abc")
    counts, replayed = await replay(bench.settings, limit=2, dry_run=True)
    assert (counts.replayed, [each.submission_id for each in replayed]) == (2, ["a", "b"])
    assert await bench.read(bench.settings.submissions_stream) == []
    assert (await replay(bench.settings, limit=1))[0] == ReplayCounts(replayed=1)
    assert [each.submission_id for each in (await replay(bench.settings, limit=1))[1]] == ["b"]
    with pytest.raises(ConfigurationError, match="belongs to nobody; nothing was replayed"):
        await replay(bench.settings, Selection(ids={"c", "nobody"}))
    assert (await replay(bench.settings, Selection(ids={"a", "c"})))[0] == ReplayCounts(replayed=1, already_replayed=1)


async def test_commands_list_and_replay_dead_letters(bench: IntakeBench, folder: Path) -> None:
    await publish_dead_letters(bench, "evil\x1b[31m", reason="forbidden", detail="no\x1b]0;x\a way")
    await publish_dead_letters(bench, "plain", failed_at=datetime.now(UTC))
    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    await publisher.publish([OutgoingMessage(bench.settings.dead_letters_stream, b"not ours")])
    await publisher.close()

    listed = run_sluice_in(folder, "dead-letters", "list")
    lines = listed.stdout.decode().splitlines()
    assert (listed.returncode, len(lines)) == (0, 2)
    assert "\x1b" not in listed.stdout.decode()
    assert all(word in lines[0] for word in ("forbidden", "x1", "shop", "s3://uploads/evil", "s/0/1"))
    assert "skipped 1 messages" in listed.stderr.decode()
    rows = [json.loads(line) for line in run_sluice_in(folder, "dead-letters", "list", "--json").stdout.splitlines()]
    assert rows[0].keys() == {
        *("dead_letter", "submission_id", "reason", "detail", "attempts", "source", "failed_at", "tenant", "uri")
    }
    recent = run_sluice_in(folder, "dead-letters", "list", "--newer-than", "1h", "--tenant", "shop", "--json")
    assert [json.loads(line)["submission_id"] for line in recent.stdout.splitlines()] == ["plain"]

    assert_fails(run_sluice_in(folder, "dead-letters", "list", "--reason", "boredom"), "boredom", "not_found")
    assert_fails(run_sluice_in(folder, "dead-letters", "list", "--older-than", "soon"), "'soon' is neither")
    assert_fails(run_sluice_in(folder, "dead-letters", "replay", "--id", "absent\x1b"), "belongs to absent\ufffd")
    assert_fails(
        run_sluice_in(folder, "dead-letters", "replay", SLUICE_REDIS_URL="redis://127.0.0.1:9/0"),
        "SLUICE_REDIS_URL",
    )
    assert_fails(run_sluice_in(folder, "dead-letters", "list", SLUICE_STREAM_URL="redis://x:bad"), "SLUICE_STREAM_URL")

    done = run_sluice_in(folder, "dead-letters", "replay", "--reason", "not_found", "--json")
    assert (done.returncode, json.loads(done.stdout)["submission_id"]) == (0, "plain")
    again = run_sluice_in(folder, "dead-letters", "replay", "--reason", "not_found", "--json")
    assert (again.returncode, again.stdout) == (0, b"")
    assert "skipped 1 that were replayed before" in again.stderr.decode()


@pytest.mark.kafka
async def test_kafka_replays_to_the_same_partition_and_reports_refused_messages(
    bench: IntakeBench, kafka_address: str
) -> None:
    """Kafka has other positions, headers of the record itself, and refuses messages that are too large."""
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
    await bench.settled(2, stalled_s=90)
    bench.put("kafka-late.jpg")
    counts, replayed = await replay(bench.settings, Selection(ids={"late"}))
    assert (counts, [each.message.key for each in replayed]) == (ReplayCounts(replayed=1), [b"k"])
    (verdict,), letters = await bench.settled(3, stalled_s=60)
    assert (verdict.submission_id, len(letters)) == ("late", 2)
    again = [each for each in await bench.read(bench.settings.submissions_stream) if each.key == b"k"]
    assert len({each.source.rpartition("/")[0] for each in again}) == 1, "the same key, so the same partition"
    assert all(dict(remove_own_headers(each.headers)) == CLOUD_EVENT for each in again)
    assert (await replay(bench.settings))[0] == ReplayCounts(replayed=1, already_replayed=1)
    _, letters = await bench.settled(4, stalled_s=60)
    assert sorted(each.attempts for each in letters) == [1, 1, 2]

    publisher = await open_publisher(StreamConfig.from_settings(bench.settings))
    dead = letter(submission_id="huge")
    huge = OutgoingMessage(bench.settings.dead_letters_stream, os.urandom(1_200_000), b"h", dead.headers())
    small = OutgoingMessage(bench.settings.dead_letters_stream, b"small", b"h", dead.headers())
    await publisher.publish([small, huge])
    await publisher.publish([small])
    await publisher.close()
    progress: list[str] = []
    counts, _ = await replay(bench.settings, Selection(ids={"huge"}), progress=progress.append)
    assert counts == ReplayCounts(replayed=2, refused=1)
    assert any("did not replay" in line and "Kafka rejects a message of 1200000 bytes" in line for line in progress)
