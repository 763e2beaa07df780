"""Errors for invalid settings of the streams."""

from typing import Any

import pytest
from redis import exceptions

from services.core.errors import ConfigurationError, StreamUnavailable
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer, open_publisher, open_reader
from services.streams.kafka import client as kafka_clients
from services.streams.kafka.client import parse_bootstrap_servers
from services.streams.redis import client as redis_clients
from tests.support.streams_bench import Streams


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("kafka://one:9092", ["one:9092"]),
        ("kafka://one:9092,two:9093, three", ["one:9092", "two:9093", "three:9092"]),
        ("kafka://one:9092/", ["one:9092"]),
        ("kafka://[::1]:9092,[::1]", ["[::1]:9092", "[::1]:9092"]),
    ],
)
def test_parse_bootstrap_servers_valid_url_gives_the_brokers(url: str, servers: list[str]) -> None:
    assert parse_bootstrap_servers(url) == servers


@pytest.mark.parametrize(
    "url", ["kafka://", "kafka://one:", "kafka://one:http", "kafka://u@one", "kafka://one/x", "kafka://a,,b"]
)
def test_parse_bootstrap_servers_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_STREAM_URL"):
        parse_bootstrap_servers(url)


@pytest.mark.parametrize("open_", [lambda config: open_consumer(config, "m"), open_publisher, open_reader])
@pytest.mark.parametrize("url", ["redis://localhost:6379/0?max_connections=x"])
async def test_invalid_redis_url_is_rejected(open_: Any, url: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_STREAM_URL"):
        await open_(StreamConfig.from_settings(Streams("redis", url).settings()))


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("group_id", "cannot set group_id"),
        ("group_instance_id", "cannot set group_instance_id"),
        ("sesion_timeout_ms", "no kafka-python client knows"),
    ],
)
async def test_invalid_kafka_option_is_rejected(option: str, complaint: str) -> None:
    settings = Streams("kafka", "kafka://127.0.0.1:1").settings(kafka_options={option: 1})
    with pytest.raises(ConfigurationError, match=complaint):
        await open_consumer(StreamConfig.from_settings(settings), "member")


@pytest.mark.parametrize("open_", [lambda config: open_consumer(config, "m"), open_publisher, open_reader])
@pytest.mark.parametrize("scheme", ["redis", "kafka"])
async def test_unreachable_server_is_unavailable(open_: Any, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_clients, "CONNECT_S", 0.5)
    monkeypatch.setattr("services.streams.redis.client.CONNECT_S", 0.5)
    with pytest.raises(StreamUnavailable, match="does not answer"):
        await open_(StreamConfig.from_settings(Streams(scheme, f"{scheme}://127.0.0.1:1").settings()))


def test_wrong_password_is_a_configuration_error() -> None:
    assert not redis_clients.is_outage(exceptions.AuthenticationError("WRONGPASS"))
    assert redis_clients.is_outage(exceptions.BusyLoadingError("loading"))
    assert redis_clients.is_outage(exceptions.ReadOnlyError("replica"))
    assert isinstance(redis_clients.map_error(exceptions.AuthenticationError("no")), ConfigurationError)
