"""All settings. Each is an environment variable with the prefix `SLUICE_`.

Credentials are not settings, except SLUICE_REDIS_SIGNING_KEY. S3 credentials come from AWS's credential sources, Kafka
credentials from `SLUICE_KAFKA_OPTIONS`, and Redis credentials from the URL.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from services.core.engine_flags import parse_engine_flags
from services.core.errors import ConfigurationError
from services.core.tenancy import parse_prefix, parse_tenant_policy, parse_tenant_prefix

Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]

NEEDED_BY_WORKERS = ("stream_url", "redis_url", "s3_buckets", "policy_bucket", "model")


class Settings(BaseSettings):
    """The settings of a deployment. Immutable. Sizes are in bytes, durations in seconds, unless the name has a unit.

    Settings that may hold credentials are not in its `repr`.
    """

    model_config = SettingsConfigDict(env_prefix="SLUICE_", frozen=True, extra="ignore", env_ignore_empty=True)

    # Addresses
    stream_url: str = Field(
        "", repr=False, description="URL of Kafka or Redis: kafka://host:9092,host:9092 or redis://host:6379/0"
    )
    redis_url: str = Field(
        "",
        repr=False,
        description="URL of the Redis or Valkey that all processes share; configure it to evict no keys. "
        "The loss of its data loses no submission",
    )
    s3_endpoint: str | None = Field(None, description="URL of an S3 server other than AWS")
    s3_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="the only buckets that Sluice reads, separated by commas"
    )
    policy_bucket: str = Field("", description="bucket of the policy versions and API keys")
    tenant_prefixes: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="the objects of each tenant, such as `shop=s3://uploads/shop/,forum=s3://forum-uploads`, separated "
        "by commas; repeat a tenant for several prefixes. If set, a tenant may use no other objects, and may name no "
        "policy but its own; unset: tenants are not separated",
    )
    tenant_policies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="policies that a tenant may name besides its own, such as `shop=strict,shop=lenient`, separated by "
        "commas; its own is the one that the tenants document gives it. Needs SLUICE_TENANT_PREFIXES",
    )
    model: str = Field(
        "",
        description="checkpoint: a name such as `LlavaGuard-v1.2-7B-OV`, a hub id, a folder, or `tiny`; the error for "
        "an unknown name lists all names",
    )

    model_revisions: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="commits of hub repositories, as `owner/name@commit` with 40 hexadecimal digits, separated by "
        "commas; other repositories are used at their newest commit, and only with weights as safetensors",
    )

    # Streams
    group: str = Field("sluice", description="consumer group")
    member_id: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,248})?$",
        description="Kafka: a fixed name of this member, unique in the group; after a restart the member gets its "
        "partitions back without a rebalance",
    )
    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once", description="Kafka: whether outputs and offsets are committed as one transaction"
    )
    submissions_stream: str = Field("sluice.submissions", description="stream of live submissions")
    verdicts_stream: str = Field("sluice.verdicts", description="stream of verdicts")
    dead_letters_stream: str = Field("sluice.dead-letters", description="stream of dead letters")
    backfill_stream: str = Field(
        "sluice.submissions.backfill",
        description="stream of submissions that wait for live ones, read by the group `<SLUICE_GROUP>.backfill`; "
        "empty: no backfill stream is read",
    )
    shadow_verdicts_stream: str = Field(
        "sluice.shadow-verdicts", description="stream of the verdicts of shadow versions"
    )
    kafka_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description='JSON object for every kafka-python client, for example `{"security_protocol": "SASL_SSL"}`',
    )
    kafka_partitions: Positive = Field(6, description="Kafka: number of partitions of a topic that Sluice creates")
    redis_claim_idle_s: PositiveSeconds = Field(
        15,
        description="Redis Streams: the other members take over the messages of a member without a heartbeat for this "
        "long",
    )
    redis_retention_s: PositiveSeconds = Field(
        7 * 86_400, description="Redis Streams: how long settled entries are kept; unsettled entries are kept for ever"
    )

    # Policies
    policy_refresh_s: PositiveSeconds = Field(
        5, description="interval of the refresh that finds policy changes if Redis cannot announce them"
    )
    redis_signing_key: SecretStr | None = Field(
        None,
        min_length=32,
        exclude=True,
        description="secret of at least 32 characters, equal in all processes and unknown to Redis, that signs the "
        "copies of policies and the assessments of the gateway in Redis; unset: every process reads rollouts from the "
        "policy bucket only, a new process waits for the bucket, and assessments in Redis are used unsigned. It is "
        "never written to a file or to the `args` of the application",
    )
    sample_size: Positive = Field(
        10_000, description="recent submissions of each policy that Redis keeps, by reference, for backtests"
    )

    # Ray
    ray_address: str | None = Field(
        None, description="address of the Ray cluster to run on; unset: Sluice starts a cluster on this machine"
    )

    # Work in flight
    intake_replicas: Positive = Field(
        1, description="number of intake replicas; the minimum if SLUICE_INTAKE_MAX_REPLICAS is set"
    )
    in_flight: Positive = Field(
        64,
        description="live submissions that one intake replica works on at a time; it works on half as many backfill "
        "submissions at the same time",
    )
    image_memory_bytes: Positive = Field(
        1 << 30, description="memory for images in flight, per intake replica and per gateway replica"
    )
    judge_deadline_s: PositiveSeconds = Field(
        3600,
        description="a submission that cannot be judged for this long, while others are judged, becomes a dead letter",
    )
    blocked_deadline_s: PositiveSeconds = Field(
        600,
        description="Kafka: if a submission was received this long ago and holds up a full window of its partition, "
        "SLUICE_BLOCKED_AS decides its outcome",
    )
    blocked_as: Literal["needs_review", "dead_letter"] = Field(
        "needs_review", description="outcome of a submission after SLUICE_BLOCKED_DEADLINE_S"
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(30, description="time to finish the work in flight after SIGTERM")

    # Images
    image_limit_bytes: Positive = Field(64 << 20, description="largest image file that is judged")
    image_limit_px: Positive = Field(
        100_000_000, description="largest image, width x height in pixels; checked before decoding"
    )
    fetch_deadline_s: PositiveSeconds = Field(
        30, description="time limit for fetching one object, from the request to the last byte"
    )
    decode_workers: Positive = Field(
        2,
        description="processes that decode images, per intake replica and per gateway replica; together they use at "
        "most half of the container's memory, but each gets 512 MiB",
    )
    decode_deadline_s: PositiveSeconds = Field(
        30, description="time limit for decoding one image; then the decoder is killed"
    )

    # Guard
    guard_replicas: Positive = Field(1, description="number of guard replicas, unless SLUICE_GUARD_MAX_REPLICAS is set")
    guard_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="GPUs of one guard replica. Unset: 1 if Ray has GPUs, else 0 (the engine runs on the CPU). 2 or "
        "more for a checkpoint too large for one GPU; 0.5 for two replicas of a small checkpoint on one GPU",
    )
    guard_in_flight: Positive | None = Field(
        None,
        description="assessments that one guard replica gives to its engine at a time; unset: as many as keep the GPU "
        "busy and fit into its memory, 16 or fewer for most checkpoints, and 48 for a 0.5B model on a GPU with 70 GiB",
    )
    guard_deadline_s: PositiveSeconds = Field(
        60,
        description="time limit for one assessment (one call of the guard for one image), from the moment that the "
        "engine takes it",
    )
    image_order: Literal["image_first", "text_first"] | None = Field(
        None,
        description="whether the image comes before or after the policy in the prompt, to evaluate an order; unset: "
        "that of the checkpoint, `image_first` for all",
    )
    engine_flags: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="flags for SGLang, separated by spaces, which replace those of Sluice, for example "
        "`--quantization fp8` or `--attention-backend triton`; flags that open the engine to others are refused",
    )
    guard_start_s: PositiveSeconds = Field(900, description="time limit for the engine to load its weights and warm up")

    # Autoscaling
    guard_max_replicas: Positive | None = Field(
        None, description="maximum of guard replicas; if set, their number follows the backlog"
    )
    guard_min_replicas: Annotated[int, Field(ge=0)] = Field(
        0, description="minimum of guard replicas if their number follows the backlog; at least 1 with a gateway"
    )
    intake_max_replicas: Positive | None = Field(
        None, description="maximum of intake replicas; unset: always SLUICE_INTAKE_REPLICAS"
    )
    objective_s: PositiveSeconds = Field(
        300, description="objective for the time from submission to verdict, for live submissions"
    )
    backfill_objective_s: PositiveSeconds = Field(
        6 * 3600, description="objective for the time in which a backfill is finished"
    )
    idle_s: PositiveSeconds = Field(
        600, description="after this time without work, the number of guard replicas may become zero"
    )
    scale_down_s: PositiveSeconds = Field(
        240, description="replicas are stopped after fewer replicas have been enough for this long"
    )
    replica_rate: Annotated[float, Field(gt=0)] = Field(
        5, description="assumed rate of one guard replica in submissions a second, until the rate is measured"
    )
    replica_start_s: PositiveSeconds = Field(
        300, description="assumed time from the request for a guard replica until it judges, until the time is measured"
    )

    # Gateway
    gateway_host: str = Field(
        "127.0.0.1",
        description="address to listen on; the gateway speaks plain HTTP, so put a TLS proxy in front of it",
    )
    gateway_port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        8080, description="port, shared by the replicas on one machine; if unset, `up --embedded` takes a free port"
    )
    gateway_replicas: Annotated[int, Field(ge=0)] = Field(
        1, description="number of gateway replicas; 0 means no gateway"
    )
    gateway_connections: Positive = Field(1024, description="open connections at a time, per gateway replica")
    gateway_in_flight: Positive = Field(
        128, description="images that one gateway replica works on at a time; one API key gets a quarter"
    )
    gateway_rate_per_s: Annotated[float, Field(gt=0)] = Field(
        50, description="images a second of one API key over all replicas, unless the key has a rate of its own"
    )
    gateway_concurrency: Positive = Field(
        32,
        description="requests of one API key at a time, per gateway replica; each image that one judges at a time "
        "beyond its first counts as a request",
    )
    gateway_body_limit_bytes: Positive = Field(32 << 20, description="largest body of a request, including base64")
    gateway_body_memory_bytes: Positive = Field(
        256 << 20,
        description="memory for request bodies and images fetched from URLs, per gateway replica; one API key gets a "
        "quarter of it",
    )
    gateway_body_deadline_s: PositiveSeconds = Field(20, description="time limit for the body of a request to arrive")
    gateway_deadline_s: PositiveSeconds = Field(60, description="time limit for judging one image, including the wait")
    gateway_keep_s: Positive = Field(86_400, description="how long assessments and idempotency keys are kept")
    gateway_keys_refresh_s: PositiveSeconds = Field(
        2,
        description="interval at which API keys are read again: a revoked key is refused within it, or within 5 "
        "minutes while the policy bucket does not answer",
    )
    gateway_fetch_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts (host or host:port) whose http(s) URLs the gateway fetches; unset: none"
    )

    # Files on this machine
    log_file: Path | None = Field(None, description="file that also collects the log of every replica on this machine")
    state_dir: Path = Field(
        Path.home() / ".cache" / "sluice", description="staged checkpoints and engine logs; safe to delete"
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_empty_backfill_stream(cls, values: Any) -> Any:
        # An empty variable counts as unset (env_ignore_empty). This one may be empty, and then there is no backfill.
        if isinstance(values, dict) and os.environ.get("SLUICE_BACKFILL_STREAM") == "":
            values.setdefault("backfill_stream", "")
        return values

    @field_validator("stream_url")
    @classmethod
    def _check_stream_url(cls, url: str) -> str:
        return _check_url(url, "kafka", "redis", "rediss")

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str) -> str:
        return _check_url(url, "redis", "rediss", "unix")

    @field_validator("s3_endpoint")
    @classmethod
    def _check_s3_endpoint(cls, url: str | None) -> str | None:
        return _check_url(url, "http", "https") if url else None

    @field_validator("model_revisions")
    @classmethod
    def _check_revisions(cls, revisions: tuple[str, ...]) -> tuple[str, ...]:
        for revision in revisions:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", revision, re.ASCII):
                raise ValueError(f"{revision!r} is not owner/name@commit with 40 hexadecimal digits")
        return revisions

    @field_validator("tenant_prefixes")
    @classmethod
    def _check_tenant_prefixes(cls, entries: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        buckets = info.data.get("s3_buckets")
        for entry in entries:
            bucket, _ = parse_prefix(parse_tenant_prefix(entry)[1])
            if buckets and bucket not in buckets:
                raise ValueError(f"{entry!r} is in the bucket {bucket!r}, which is not one of SLUICE_S3_BUCKETS")
        return entries

    @field_validator("tenant_policies")
    @classmethod
    def _check_tenant_policies(cls, entries: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for entry in entries:
            parse_tenant_policy(entry)
        if entries and not info.data.get("tenant_prefixes", True):
            raise ValueError("it has no effect without SLUICE_TENANT_PREFIXES; set both, or neither")
        return entries

    @field_validator("engine_flags", mode="before")
    @classmethod
    def _split_engine_flags(cls, flags: Any) -> Any:
        return parse_engine_flags(flags) if isinstance(flags, str | list | tuple) else flags

    @field_validator(
        "s3_buckets", "tenant_prefixes", "tenant_policies", "gateway_fetch_hosts", "model_revisions", mode="before"
    )
    @classmethod
    def _split(cls, names: Any) -> Any:
        if isinstance(names, str):
            return tuple(name.strip() for name in names.split(",") if name.strip())
        return names


def _check_url(url: str, *schemes: str) -> str:
    """Check the scheme and the ports of a URL, which may name several hosts. An empty URL is valid."""
    prefixes = tuple(f"{scheme}://" for scheme in schemes)
    if url and not url.startswith(prefixes):
        raise ValueError(f"must begin with {' or '.join(prefixes)}")
    try:
        for host in urlsplit(url).netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        raise ValueError("has an invalid port; in a password, write /, ? and # as %2F, %3F and %23") from None
    return url


def load(*needed: str) -> Settings:
    """Read the settings from the environment.

    Args:
        needed: names of the fields that must be set. Without names: the fields that a worker needs.

    Raises:
        ConfigurationError: a variable is missing or wrong. The sentence names every one.
    """
    try:
        settings = Settings()
    except SettingsError:  # only this setting is JSON
        raise ConfigurationError("SLUICE_KAFKA_OPTIONS is wrong: it is not a JSON object") from None
    except ValidationError as error:
        problems = [
            f"SLUICE_{str(problem['loc'][0]).upper()} is wrong: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(problems)) from None
    require(settings, *needed)
    return settings


def require(settings: Settings, *needed: str) -> None:
    """Check that the fields `needed` are set. Without names: the fields that a worker needs.

    Raises:
        ConfigurationError: a variable is missing. The sentence names every one.
    """
    missing = {
        f"SLUICE_{name.upper()}": Settings.model_fields[name].description
        for name in needed or NEEDED_BY_WORKERS
        if not getattr(settings, name)
    }
    if missing:
        described = "; ".join(f"{name}: {description}" for name, description in missing.items())
        raise ConfigurationError(
            f"{', '.join(missing)} not set; set {'it' if len(missing) == 1 else 'them'} ({described}), or start "
            "everything on this machine with `sluice up --embedded`"
        )
