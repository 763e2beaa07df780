"""The client of the shared Redis: its keys, its scripts, and the errors that it raises."""

import uuid
from collections.abc import AsyncIterator

import pytest

from services.core.errors import ConfigurationError, RedisUnavailable
from services.core.redis import RedisClient, map_redis_errors, redis_client


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(valkey_url, f"{uuid.uuid4().hex}:")
    yield client
    await client.close()


def test_key_joins_prefix_and_parts() -> None:
    assert RedisClient("redis://host", "sluice:b:policies:").key("lease", "shop") == "sluice:b:policies:lease:shop"


async def test_run_script_gets_keys_and_arguments(redis: RedisClient) -> None:
    name = redis.key("count")
    assert await redis.run("return redis.call('INCRBY', KEYS[1], ARGV[1])", [name], 7) == 7
    assert await redis.call(redis.client.get(name)) == b"7"


async def test_run_failing_script_raises_redis_unavailable(redis: RedisClient) -> None:
    with pytest.raises(RedisUnavailable, match="SLUICE_REDIS_URL"):
        await redis.run("return redis.call('NONE')", [])


async def test_call_without_server_raises_redis_unavailable() -> None:
    client = RedisClient("redis://127.0.0.1:1/0", "")
    with pytest.raises(RedisUnavailable):
        await client.call(client.client.get("a"))
    await client.close()


def test_map_redis_errors_timeout_without_text_names_its_class() -> None:
    with pytest.raises(RedisUnavailable, match="TimeoutError"), map_redis_errors():
        raise TimeoutError


def test_map_redis_errors_other_error_passes() -> None:
    with pytest.raises(KeyError), map_redis_errors():
        raise KeyError


@pytest.mark.parametrize("url", ["http://host", "redis://host:port", "redis://host?socket_timeout=soon"])
def test_redis_client_invalid_url_raises_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^SLUICE_REDIS_URL is wrong: "):
        redis_client(url, setting="SLUICE_REDIS_URL", connections=1, timeout_s=1)
