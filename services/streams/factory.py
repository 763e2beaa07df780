"""Opens the stream system that `SLUICE_STREAM_URL` names; nothing else chooses between Kafka and Redis Streams."""

from services.core.settings import Settings
from services.streams.base import GroupConsumer, Publisher, Reader
from services.streams.kafka.consumer import KafkaGroupConsumer
from services.streams.kafka.producer import KafkaPublisher
from services.streams.kafka.reader import KafkaReader
from services.streams.redis.consumer import RedisGroupConsumer
from services.streams.redis.producer import RedisPublisher
from services.streams.redis.reader import RedisReader


async def open_consumer(settings: Settings, member: str) -> GroupConsumer:
    """Join the consumer group `settings.group` as `member`, a name for people and logs.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    if _is_kafka(settings):
        return await KafkaGroupConsumer.open(settings, member)
    return await RedisGroupConsumer.open(settings, member)


async def open_publisher(settings: Settings) -> Publisher:
    """Publish without being a member of a group.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    return await (KafkaPublisher.open(settings) if _is_kafka(settings) else RedisPublisher.open(settings))


async def open_reader(settings: Settings) -> Reader:
    """Read whole streams without being a member of a group.

    Raises:
        ConfigurationError: the URL, an option or the credentials are wrong.
        StreamUnavailable: the stream system did not answer within 15 s.
    """
    return await (KafkaReader.open(settings) if _is_kafka(settings) else RedisReader.open(settings))


def _is_kafka(settings: Settings) -> bool:
    return settings.stream_url.startswith("kafka://")
