"""The part of the settings that consumers, publishers and readers of streams use."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from services.core.settings import Settings


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """One stream system, the streams on it, and one consumer group."""

    url: str
    """`kafka://host:9092,host:9092` or `redis://host:6379/0`."""
    group: str
    submissions_stream: str
    """The stream that the group consumes."""
    verdicts_stream: str
    shadow_verdicts_stream: str
    dead_letters_stream: str
    in_flight: int
    """Messages that one member works on at a time."""
    max_members: int
    """Members that the group may have at a time."""
    member_id: str
    """Kafka: the `group.instance.id` of a static member; empty: the broker gives each member an id."""
    delivery: Literal["at_least_once", "exactly_once"]
    """Kafka only; Redis Streams always publishes exactly once per entry."""
    kafka_options: Mapping[str, Any]
    kafka_partitions: int
    redis_claim_idle_s: float
    redis_retention_s: float

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The stream of live submissions."""
        return cls(
            url=settings.stream_url,
            group=settings.group,
            submissions_stream=settings.submissions_stream,
            verdicts_stream=settings.verdicts_stream,
            shadow_verdicts_stream=settings.shadow_verdicts_stream,
            dead_letters_stream=settings.dead_letters_stream,
            in_flight=settings.in_flight,
            max_members=max(settings.intake_replicas, settings.intake_max_replicas or 1),
            member_id=settings.member_id,
            delivery=settings.delivery,
            kafka_options=settings.kafka_options,
            kafka_partitions=settings.kafka_partitions,
            redis_claim_idle_s=settings.redis_claim_idle_s,
            redis_retention_s=settings.redis_retention_s,
        )

    @classmethod
    def for_backfill(cls, settings: Settings) -> Self:
        """The backfill stream, which has a consumer group of its own."""
        live = cls.from_settings(settings)
        return replace(live, submissions_stream=settings.backfill_stream, group=f"{settings.group}.backfill")


def list_submission_streams(settings: Settings) -> list[str]:
    """Return the names of the streams that submissions arrive on."""
    return [stream for stream in (settings.submissions_stream, settings.backfill_stream) if stream]


def list_output_streams(settings: Settings) -> list[str]:
    """Return the names of the streams that Sluice writes."""
    return [settings.verdicts_stream, settings.shadow_verdicts_stream, settings.dead_letters_stream]
