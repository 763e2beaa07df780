"""Huge values that an attacker writes to the keys of replays in Redis reach no process."""

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from pipelines.dead_letters.replay_log import ReplayLog
from pipelines.intake.replayed_attempts import ReplayedAttempts
from services.core.messages import REPLAYED_FROM_HEADER
from services.core.redis import RedisClient
from services.streams.base import Message
from tests.support.images import make_settings
from tests.support.redis_attacks import little_is_sent, run_on_server

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)


@pytest.fixture
async def client(valkey_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(valkey_url, "sluice:")
    yield client
    await client.close()


def replayed(value: bytes) -> Message:
    position = b"sluice.dead-letters/0/7"
    return Message(value, b"key", ((REPLAYED_FROM_HEADER, position),), "sluice.submissions/0/1", NOW)


async def test_huge_tries_are_not_read_and_the_others_count(client: RedisClient) -> None:
    stream = uuid.uuid4().hex
    attempts = ReplayedAttempts(client, stream)
    values = [b"a", b"b", b"c", b"absent"]
    await attempts.record({("sluice.dead-letters/0/7", value): 7 for value in values[:-1]})
    assert await attempts.find([replayed(value) for value in values]) == [7, 7, 7, 0]
    for script in (
        "redis.call('SET', KEYS[1], huge)",
        "redis.call('DEL', KEYS[1]) redis.call('RPUSH', KEYS[1], huge)",
    ):
        await run_on_server(client.client, script, attempts._key(b"sluice.dead-letters/0/7", b"b"))
        async with little_is_sent(client.client):
            assert await attempts.find([replayed(value) for value in values]) == [7, 0, 7, 0]


async def test_replay_log_reads_no_huge_entry_and_no_huge_lease(client: RedisClient, valkey_url: str) -> None:
    stream = uuid.uuid4().hex
    settings = make_settings(redis_url=valkey_url, dead_letters_stream=stream)
    log, lease = (f"sluice:{stream}:{part}" for part in ("replayed", "replaying"))
    await run_on_server(client.client, "redis.call('SADD', KEYS[1], huge, 'x')", log)
    async with little_is_sent(client.client), ReplayLog(settings, lease=True, progress=print) as replay_log:
        await replay_log.add([b"a"])
        assert await replay_log.contains([b"a", b"b"]) == {b"a"}
        await replay_log.renew()
    await run_on_server(client.client, "redis.call('SET', KEYS[1], huge, 'PX', 300)", lease)
    async with little_is_sent(client.client), ReplayLog(settings, lease=True, progress=print) as replay_log:
        assert await replay_log.contains([b"a", b"b"]) == {b"a"}
