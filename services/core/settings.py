"""Every setting, in one place. Each is read from the environment with the prefix `SLUICE_`.

Credentials are not settings: S3's come the usual AWS way, Kafka's in `SLUICE_KAFKA_OPTIONS`, Redis' in its URL.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from services.core.errors import ConfigurationError

Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]

_NEEDED_BY_WORKERS = ("stream_url", "redis_url", "s3_buckets", "policy_bucket", "model")


class Settings(BaseSettings):
    """What a deployment of Sluice is told. Immutable; sizes in bytes, durations in seconds, unless the name says so."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_", frozen=True, extra="ignore", env_ignore_empty=True)

    # Where things are
    stream_url: str = Field("", description="kafka://host:9092,host:9092 or redis://host:6379/0")
    redis_url: str = Field("", description="Redis or Valkey: the cache")
    s3_endpoint: str | None = Field(None, description="an S3 server; AWS when unset")
    s3_buckets: Annotated[tuple[str, ...], NoDecode] = Field((), description="the only buckets that are read")
    policy_bucket: str = Field("", description="where policy versions live")
    model: str = Field("", description="checkpoint: a path, a hub id, or `tiny`")

    # Streams
    group: str = Field("sluice", description="consumer group")
    member_id: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,248})?$",
        description="Kafka: this member's own name, so that it gets its partitions back when it restarts; empty: none",
    )
    delivery: Literal["at_least_once", "exactly_once"] = "at_least_once"
    submissions_stream: str = "sluice.submissions"
    verdicts_stream: str = "sluice.verdicts"
    dead_letters_stream: str = "sluice.dead-letters"
    backfill_stream: str = Field(
        "sluice.submissions.backfill", description="submissions that wait for live ones; empty: none are read"
    )
    shadow_verdicts_stream: str = "sluice.shadow-verdicts"
    kafka_options: dict[str, Any] = Field(
        default_factory=dict,
        description="JSON object handed to every kafka-python client, e.g. for TLS and SASL",
    )
    kafka_partitions: Positive = Field(6, description="partitions of a Kafka topic that Sluice has to create")
    redis_claim_idle_s: PositiveSeconds = Field(
        15, description="Redis Streams: a member silent for this long loses what it holds to the others"
    )
    redis_retention_s: PositiveSeconds = Field(
        7 * 86_400, description="Redis Streams: how long settled entries are kept; unsettled ones always are"
    )

    # Policies
    policy_refresh_s: PositiveSeconds = Field(
        5, description="how long a policy is believed to be unchanged where Redis does not announce changes"
    )
    sample_size: Positive = Field(
        10_000, description="recent submissions of each policy that are remembered, by reference, for backtests"
    )

    # Ray
    ray_address: str | None = Field(None, description="Ray cluster to run on; unset: one of this machine's own")

    log_file: Path | None = Field(None, description="also collects the log of every replica on this machine")

    # Work in flight
    intake_replicas: Positive = Field(1, description="the fewest, where intake_max_replicas is set")
    in_flight: Positive = Field(64, description="submissions that one intake replica works on at a time")
    image_memory_bytes: Positive = Field(1 << 30, description="memory for images in flight, per intake replica")
    judge_deadline_s: PositiveSeconds = Field(
        3600, description="a submission that cannot be judged for this long, while others are, is a dead letter"
    )
    blocked_deadline_s: PositiveSeconds = Field(
        600, description="Kafka: a submission that holds up a full window for this long ends as blocked_as says"
    )
    blocked_as: Literal["needs_review", "dead_letter"] = "needs_review"
    drain_s: Annotated[float, Field(ge=0)] = Field(30, description="time for work in flight after SIGTERM")

    # Images
    image_limit_bytes: Positive = 64 << 20
    image_limit_px: Positive = Field(100_000_000, description="width x height, checked before decoding")
    fetch_deadline_s: PositiveSeconds = Field(30, description="for one object, from the request to the last byte")
    decode_workers: Positive = Field(2, description="processes that decode images, per intake replica")
    decode_deadline_s: PositiveSeconds = Field(30, description="for one image; a decoder that hangs is killed")

    # Guard
    guard_replicas: Positive = Field(1, description="as many, unless guard_max_replicas is set")
    guard_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs of one guard replica; unset: 1 where Ray has GPUs, else 0 (the engine runs on the CPU)"
    )
    guard_in_flight: Positive = Field(
        16, description="assessments that one guard replica gives to its engine at a time"
    )
    guard_deadline_s: PositiveSeconds = Field(60, description="for one assessment")
    guard_start_s: PositiveSeconds = Field(900, description="for the engine to load its weights and warm up")

    # Replicas that follow the backlog
    guard_max_replicas: Positive | None = Field(
        None, description="the most guard replicas; where it is set their number follows the backlog"
    )
    guard_min_replicas: Annotated[int, Field(ge=0)] = Field(
        0, description="the fewest guard replicas, where their number follows the backlog; with a gateway 1 at least"
    )
    intake_max_replicas: Positive | None = Field(None, description="the most intake replicas; unset: intake_replicas")
    objective_s: PositiveSeconds = Field(300, description="from submission to verdict, for live submissions")
    backfill_objective_s: PositiveSeconds = Field(6 * 3600, description="in which a backfill is to be done")
    idle_s: PositiveSeconds = Field(600, description="with nothing to do for this long, guard replicas may go to zero")
    scale_down_s: PositiveSeconds = Field(240, description="for how long fewer replicas must have been enough")
    replica_rate: Annotated[float, Field(gt=0)] = Field(
        5, description="submissions a second that a guard replica judges, until it is measured"
    )
    replica_start_s: PositiveSeconds = Field(
        300, description="from the wish for a guard replica until it judges, until it is measured"
    )

    # Gateway
    gateway_host: str = Field("127.0.0.1", description="where it listens; plain HTTP, so put TLS before any other")
    gateway_port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        8080, description="replicas on one machine share it; `up --embedded` takes a free one unless it is set"
    )
    gateway_replicas: Annotated[int, Field(ge=0)] = Field(1, description="0: no gateway")
    gateway_connections: Positive = Field(1024, description="open at a time, per gateway replica")
    gateway_in_flight: Positive = Field(128, description="images that one gateway replica works on at a time")
    gateway_rate_per_s: Annotated[float, Field(gt=0)] = Field(
        50, description="requests of one API key, over all replicas, unless the key has a rate of its own"
    )
    gateway_concurrency: Positive = Field(32, description="requests of one API key at a time, per gateway replica")
    gateway_body_limit_bytes: Positive = Field(32 << 20, description="one request's body, base64 included")
    gateway_body_memory_bytes: Positive = Field(
        256 << 20, description="bodies held at a time, per gateway replica; one API key gets a quarter of it"
    )
    gateway_body_deadline_s: PositiveSeconds = Field(20, description="for one request's body to arrive")
    gateway_deadline_s: PositiveSeconds = Field(60, description="for one image to be judged, waiting included")
    gateway_keep_s: Positive = Field(86_400, description="how long assessments and idempotency keys are remembered")
    gateway_keys_refresh_s: PositiveSeconds = Field(2, description="how soon a revoked API key is refused")
    gateway_fetch_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts (host or host:port) whose http(s) URLs are fetched; none are unless they are named"
    )

    state_dir: Path = Field(
        Path.home() / ".cache" / "sluice", description="staged checkpoints and engine logs; safe to delete"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_backfill(cls, values: Any) -> Any:
        # Of the other variables an empty one is the same as none.
        if isinstance(values, dict) and os.environ.get("SLUICE_BACKFILL_STREAM") == "":
            values.setdefault("backfill_stream", "")
        return values

    @field_validator("stream_url")
    @classmethod
    def _names_a_transport(cls, url: str) -> str:
        return _checked(url, "kafka", "redis", "rediss")

    @field_validator("redis_url")
    @classmethod
    def _names_redis(cls, url: str) -> str:
        return _checked(url, "redis", "rediss", "unix")

    @field_validator("s3_endpoint")
    @classmethod
    def _names_a_server(cls, url: str | None) -> str | None:
        return _checked(url, "http", "https") if url else None

    @field_validator("s3_buckets", "gateway_fetch_hosts", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        if isinstance(names, str):
            return tuple(name.strip() for name in names.split(",") if name.strip())
        return names


def _checked(url: str, *schemes: str) -> str:
    """A URL, or several hosts in one, with one of these schemes and ports that can be; empty where none is named."""
    begins = tuple(f"{scheme}://" for scheme in schemes)
    if url and not url.startswith(begins):
        raise ValueError(f"must begin with {' or '.join(begins)}")
    try:
        for host in urlsplit(url).netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        raise ValueError("has a port that is none; write /, ? and # of a password as %2F, %3F and %23") from None
    return url


def load(*needed: str) -> Settings:
    """Read the environment. `needed` names the fields that must be set; all that a worker needs when empty.

    Raises:
        ConfigurationError: naming every variable that is missing or wrong.
    """
    try:
        settings = Settings()
    except SettingsError:  # the only one that is read as JSON
        raise ConfigurationError("SLUICE_KAFKA_OPTIONS is wrong: it is no JSON object") from None
    except ValidationError as error:
        problems = [
            f"SLUICE_{str(problem['loc'][0]).upper()} is wrong: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(problems)) from None
    require(settings, *needed)
    return settings


def require(settings: Settings, *needed: str) -> None:
    """See that the fields `needed` are set; all that a worker needs when empty.

    Raises:
        ConfigurationError: naming every variable that is missing.
    """
    missing = [f"SLUICE_{name.upper()}" for name in needed or _NEEDED_BY_WORKERS if not getattr(settings, name)]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} not set; set {'it' if len(missing) == 1 else 'them'} as README.md says, or start "
            "everything here with `sluice up --embedded`"
        )
