"""Opens the stream system that `SLUICE_STREAM_URL` names; nothing else chooses between Kafka and Redis Streams."""

from services.streams.base import GroupConsumer, Publisher, Reader
from services.streams.config import StreamConfig
from services.streams.kafka.consumer import KafkaGroupConsumer
from services.streams.kafka.producer import KafkaPublisher
from services.streams.kafka.reader import KafkaReader
from services.streams.redis.consumer import RedisGroupConsumer
from services.streams.redis.producer import RedisPublisher
from services.streams.redis.reader import RedisReader


async def open_consumer(config: StreamConfig, member: str) -> GroupConsumer:
    """Join the consumer group `config.group` as `member`: the client id on Kafka, a part of the consumer's name on
    Redis Streams. It need not be unique.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    if _is_kafka(config):
        return await KafkaGroupConsumer.open(config, member)
    return await RedisGroupConsumer.open(config, member)


async def open_publisher(config: StreamConfig) -> Publisher:
    """Publish without being a member of a group.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    return await (KafkaPublisher.open(config) if _is_kafka(config) else RedisPublisher.open(config))


async def open_reader(config: StreamConfig) -> Reader:
    """Read whole streams without being a member of a group.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    return await (KafkaReader.open(config) if _is_kafka(config) else RedisReader.open(config))


def _is_kafka(config: StreamConfig) -> bool:
    return config.url.startswith("kafka://")
