"""Checks of Redis: the one that all processes share, and Redis Streams. They change only one key of their own."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Final

import redis
from redis import exceptions

from pipelines.doctor.checks import CheckResult, failed, passed
from services.core.errors import ConfigurationError, RedisUnavailable, StreamUnavailable
from services.core.settings import Settings
from services.streams.config import StreamConfig, list_output_streams, list_submission_streams

MINIMUM_RELEASE: Final = (6, 2)
"""Redis Streams needs XAUTOCLAIM and the limits of XTRIM."""

_ANSWER_S: Final = 5.0
_HIDDEN: Final = "not checked, because this user may not run INFO; Sluice itself does not need it"
_PROBE_MS: Final = 10_000


def run_redis_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `redis`, `redis persistence` and `redis eviction`."""
    with closing(_connect(settings.redis_url, "SLUICE_REDIS_URL")) as client:
        try:
            client.set(f"sluice:{settings.policy_bucket}:doctor", "probe", px=_PROBE_MS)
            facts = _read_facts(client)
        except (exceptions.RedisError, OSError) as error:
            raise RedisUnavailable(explain_failure("SLUICE_REDIS_URL", error)) from error
    yield passed("redis", f"{_name_release(facts)} answers and accepts writes")
    needed = "the gateway keeps the results of assessments there" if settings.gateway_replicas else ""
    yield check_persistence("redis persistence", facts, needed)
    yield check_eviction("redis eviction", facts)


def run_redis_stream_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `stream`, `stream version`, `stream topics` and `stream rights`."""
    with closing(_connect(settings.stream_url, "SLUICE_STREAM_URL")) as client:
        try:
            facts = _read_facts(client)
            client.ping()
            yield passed("stream", f"{_name_release(facts)} answers")
            yield check_release(facts)
            yield _check_streams(settings, client, facts)
            yield _check_rights(settings, client)
        except (exceptions.RedisError, OSError) as error:
            raise StreamUnavailable(explain_failure("SLUICE_STREAM_URL", error)) from error


def check_release(facts: Mapping[str, Any]) -> CheckResult:
    """Check the release of the server. Valkey names the release of Redis that it is compatible with."""
    if not facts:
        return passed("stream version", _HIDDEN)
    release = str(facts.get("redis_version", "0"))
    wanted = ".".join(map(str, MINIMUM_RELEASE))
    if tuple(int(part) for part in release.split(".")[:2]) < MINIMUM_RELEASE:
        return failed("stream version", f"the server is Redis {release}, and Sluice needs {wanted}: upgrade it")
    return passed("stream version", f"compatible with Redis {release}; Sluice needs {wanted}")


def check_persistence(check: str, facts: Mapping[str, Any], needed: str) -> CheckResult:
    """Check that the server keeps its data over a restart, if there is a reason why it has to."""
    if not facts:
        return passed(check, _HIDDEN)
    written = "aof_last_write_status" if facts.get("aof_enabled") else "rdb_last_bgsave_status"
    if facts.get(written, "ok") != "ok":
        return failed(check, "the last write of the data failed: make room on the server's disk, and read its log")
    if facts.get("aof_enabled"):
        return passed(check, "the append-only file is on")
    if facts.get("save") or facts.get("save") is None:
        kind = "snapshots are on" if facts.get("save") else "the append-only file is off, and the server hides `save`"
        return passed(check, f"{kind}; a crash loses the newest changes")
    if not needed:
        return passed(check, "off: a restart forgets crash counts and samples, and no submission")
    return failed(
        check, f"off, so a restart of the server loses all its data, and {needed}: set `appendonly yes` on the server"
    )


def check_eviction(check: str, facts: Mapping[str, Any]) -> CheckResult:
    """Check that the server evicts no keys if its memory is full."""
    if not facts:
        return passed(check, _HIDDEN)
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        return failed(
            check,
            f"the server's maxmemory-policy is {policy}, so it removes Sluice's data if its memory is full: set it to "
            "noeviction",
        )
    return passed(check, "the server evicts no keys")


def explain_failure(setting: str, error: BaseException) -> str:
    """One sentence about the error of a command."""
    detail = str(error).removesuffix(".") or type(error).__name__
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError | exceptions.NoPermissionError):
        return f"the server refuses the user in {setting}: {detail}; correct the password or the user's rights"
    if isinstance(error, exceptions.ReadOnlyError):
        return f"the server is a read-only replica; set {setting} to the primary"
    if isinstance(error, exceptions.OutOfMemoryError):
        return f"the server's memory is full: {detail}; raise its maxmemory"
    if isinstance(error, exceptions.ResponseError):
        return f"the server refuses a command: {detail}; correct its configuration"
    return f"the server does not answer: {detail}; start it, or correct {setting}"


def _connect(url: str, setting: str) -> "redis.Redis":
    try:
        return redis.Redis.from_url(
            url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S, decode_responses=True
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{setting} is wrong: {error}") from None


def _read_facts(client: "redis.Redis") -> dict[str, Any]:
    """INFO, and the setting `save`. Hosted servers hide CONFIG: then `save` is None. Empty if INFO is forbidden."""
    try:
        facts: dict[str, Any] = dict(client.info("everything"))
    except exceptions.NoPermissionError:
        return {}  # Sluice itself needs no INFO
    try:
        facts["save"] = dict(client.config_get("save")).get("save")
    except exceptions.ResponseError:
        facts["save"] = None
    return facts


def _name_release(facts: Mapping[str, Any]) -> str:
    if "valkey_version" in facts:
        return f"Valkey {facts['valkey_version']}"
    return f"Redis {facts.get('redis_version', '(unknown release)')}"


def _check_streams(settings: Settings, client: "redis.Redis", facts: Mapping[str, Any]) -> CheckResult:
    names = [*list_submission_streams(settings), *list_output_streams(settings)]
    kinds = {name: str(client.type(name)) for name in names}
    if wrong := [name for name, kind in kinds.items() if kind not in ("stream", "none")]:
        return failed(
            "stream topics",
            f"the key {wrong[0]} is a {kinds[wrong[0]]} and no stream: use another database in SLUICE_STREAM_URL, or "
            "another name of the stream",
        )
    kept = check_persistence("stream topics", facts, "submissions that wait would be lost")
    if not kept.is_ok:
        return kept
    evicting = check_eviction("stream topics", facts)
    if not evicting.is_ok:
        return evicting
    existing = [name for name, kind in kinds.items() if kind == "stream"]
    return passed("stream topics", f"{len(existing)} of {len(kinds)} streams exist; Sluice creates the others")


def _check_rights(settings: Settings, client: "redis.Redis") -> CheckResult:
    """Run each command so that it changes nothing: the server checks the rights first."""
    group, stream = f"doctor-{uuid.uuid4()}", StreamConfig.from_settings(settings).submissions_stream
    commands: list[tuple[str | int, ...]] = [
        ("XADD", settings.verdicts_stream, "0-0", "probe", ""),
        ("XREADGROUP", "GROUP", group, "doctor", "COUNT", 1, "STREAMS", stream, ">"),
        ("XACK", stream, group, "0-1"),
        ("XAUTOCLAIM", stream, group, "doctor", 0, "0-0"),
        ("XPENDING", stream, group),
        ("XRANGE", stream, "-", "+", "COUNT", 1),
        ("EVAL", "return 1", 0),
    ]
    for command in commands:
        try:
            client.execute_command(*command)  # type: ignore[no-untyped-call]
        except exceptions.NoPermissionError as error:
            return failed("stream rights", f"this user may not run {command[0]}: {error}; grant it")
        except exceptions.ResponseError:
            continue  # allowed, and refused for what it asks: the id is too small, or there is no such group
    return passed("stream rights", "this user may run the commands of Redis Streams")
