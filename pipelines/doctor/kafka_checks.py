"""Checks of Kafka: the connection, the release of the brokers, the topics, and what this user may do."""

import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import Any, Final

import kafka
from kafka import errors
from kafka.admin import MemberToRemove

from pipelines.doctor.checks import CheckResult, failed, passed
from services.core.errors import StreamUnavailable
from services.core.retry import retry_blocking
from services.core.settings import Settings
from services.streams.config import StreamConfig, list_output_streams, list_submission_streams
from services.streams.kafka.client import connect, parse_bootstrap_servers

MINIMUM_RELEASE: Final = (2, 5)
"""The first release with the protocol of consumer groups in transactions, which exactly-once delivery uses."""

_CONNECT_MS: Final = 8_000
_COORDINATOR_S: Final = 10.0
_UNKNOWN_TOPIC: Final = 3
_FORBIDDEN_TOPIC: Final = 29


def run_kafka_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `stream`, `stream version`, `stream topics` and `stream rights`."""
    config = StreamConfig.from_settings(settings)
    with closing(connect(config, kafka.KafkaAdminClient, bootstrap_timeout_ms=_CONNECT_MS)) as admin:
        yield passed("stream", f"Kafka answers at {', '.join(parse_bootstrap_servers(config.url))}")
        try:
            cluster = admin.describe_cluster()
            release = check_release([_read_release(admin, broker["broker_id"]) for broker in cluster["brokers"]])
            yield release
            if not release.is_ok:
                return  # The next questions need newer requests.
            topics = {topic["name"]: topic for topic in admin.describe_topics(_list_topics(settings))}
            yield _check_topics(settings, admin, topics)
            yield _check_rights(settings, admin, topics)
        except errors.KafkaError as error:
            raise StreamUnavailable(f"Kafka does not answer the question: {error}; check its log") from error


def check_release(releases: Collection[tuple[int, ...]]) -> CheckResult:
    """Check the releases of all brokers."""
    oldest = ".".join(map(str, min(releases)))
    if min(releases) < MINIMUM_RELEASE:
        wanted = ".".join(map(str, MINIMUM_RELEASE))
        return failed("stream version", f"a broker runs Kafka {oldest}, and Sluice needs {wanted}: upgrade the brokers")
    return passed("stream version", f"the brokers speak the protocol of Kafka {oldest} or newer")


def _read_release(admin: Any, broker: int) -> tuple[int, ...]:
    return tuple(admin.get_broker_version_data(broker).broker_version)


def _list_topics(settings: Settings) -> list[str]:
    return [*list_submission_streams(settings), *list_output_streams(settings)]


def _check_topics(settings: Settings, admin: Any, topics: Mapping[str, Any]) -> CheckResult:
    missing = [name for name in _list_topics(settings) if _error_code(topics, name) == _UNKNOWN_TOPIC]
    if not missing:
        partitions = len(topics[settings.submissions_stream].get("partitions") or ())
        detail = f"{settings.submissions_stream} has {partitions} partitions"
        members = max(settings.intake_replicas, settings.intake_max_replicas or 1)
        if 0 < partitions < members:
            return failed(
                "stream topics",
                f"{detail}, and up to {members} intake replicas would share them, so some would have no work: add "
                "partitions, or lower SLUICE_INTAKE_MAX_REPLICAS",
            )
        return passed("stream topics", f"{len(topics)} topics exist; {detail}")
    wanted = {name: {"num_partitions": settings.kafka_partitions, "replication_factor": -1} for name in missing}
    try:
        admin.create_topics(wanted, validate_only=True)  # the broker decides, and creates nothing
    except errors.KafkaError as error:
        return failed(
            "stream topics",
            f"{', '.join(missing)} do not exist, and Kafka would not let Sluice create them ({type(error).__name__}): "
            "create them, or grant the right to create them",
        )
    return passed("stream topics", f"Sluice may create those that do not exist: {', '.join(missing)}")


def _check_rights(settings: Settings, admin: Any, topics: Mapping[str, Any]) -> CheckResult:
    inputs, outputs = list_submission_streams(settings), list_output_streams(settings)
    lacking = [
        f"{right} on the topic {name}"
        for names, right in ((inputs, "READ"), (outputs, "WRITE"))
        for name in names
        if not _allows(topics, name, right)
    ]
    groups = [StreamConfig.from_settings(settings).group]
    if settings.backfill_stream:
        groups.append(StreamConfig.for_backfill(settings).group)
    lacking += [f"READ on the consumer group {group}" for group in groups if not _may_join(admin, group)]
    if settings.delivery == "exactly_once":
        lacking += [
            f"WRITE on the transactional ids {group}/*" for group in groups if not _may_begin_transactions(admin, group)
        ]
    if lacking:
        return failed("stream rights", f"this user lacks {', '.join(lacking)}: grant it")
    return passed("stream rights", f"this user may read {', '.join(inputs)} and write {', '.join(outputs)}")


def _leave_group(admin: Any, group: str) -> None:
    """Have a member leave that does not exist. It needs the right to join, and changes nothing."""
    member = MemberToRemove(member_id=f"sluice-doctor-{uuid.uuid4()}")
    try:
        admin.remove_group_members(group, [member])
    except (errors.UnknownMemberIdError, errors.GroupIdNotFoundError):
        return
    except errors.RetriableError as error:  # the first question makes a new cluster create its topic of groups
        raise StreamUnavailable(f"Kafka has no coordinator for the consumer group {group}: {error}") from error


def _error_code(topics: Mapping[str, Any], name: str) -> int:
    return int(topics[name]["error_code"]) if name in topics else _UNKNOWN_TOPIC


def _allows(topics: Mapping[str, Any], name: str, right: str) -> bool:
    """Whether this user has a right on a topic. The broker also says so of a topic that does not exist."""
    if _error_code(topics, name) == _FORBIDDEN_TOPIC:
        return False
    granted = topics[name].get("authorized_operations") if name in topics else None
    return granted is None or right in granted


def _may_join(admin: Any, group: str) -> bool:
    try:
        retry_blocking(lambda: _leave_group(admin, group), within_s=_COORDINATOR_S)
    except errors.GroupAuthorizationFailedError:
        return False
    return True


def _may_begin_transactions(admin: Any, group: str) -> bool:
    """Whether this user has a right on the transactional ids of a group's members. Before Kafka 3.0: True."""
    try:
        retry_blocking(lambda: _describe_transaction(admin, f"{group}/doctor"), within_s=_COORDINATOR_S)
    except errors.TransactionalIdAuthorizationFailedError:
        return False
    return True


def _describe_transaction(admin: Any, transactional_id: str) -> None:
    """Ask for a transaction that does not exist."""
    try:
        admin.describe_transactions([transactional_id])
    except (errors.TransactionalIdNotFoundError, errors.IncompatibleBrokerVersion):
        return
    except errors.RetriableError as error:  # as for the groups
        raise StreamUnavailable(
            f"Kafka has no coordinator for the transactions of {transactional_id}: {error}"
        ) from error
