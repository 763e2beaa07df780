"""`sluice doctor` on real brokers of Kafka: one that allows everything, and one with access control lists."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ACLResourcePatternType, ResourcePattern, ResourceType

from pipelines.doctor.checks import CheckResult
from pipelines.doctor.kafka_checks import check_release
from services.core.settings import Settings
from tests.support.command_line import run_sluice_in
from tests.support.kafka_broker import Broker
from tests.support.ports import free_ports
from tests.support.servers import require_kafka

CHECKS = ["stream", "stream version", "stream topics", "stream rights"]


class GuardedBroker(Broker):
    """A broker that enforces access control lists. Whatever has no list is allowed."""

    def _more_listeners(self) -> str:
        return super()._more_listeners() + (
            "\nauthorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer"
            "\nallow.everyone.if.no.acl.found=true\n"
        )


def make_settings(address: str, prefix: str, **changes: Any) -> Settings:
    return Settings(
        stream_url=f"kafka://{address}",
        group=f"{prefix}.group",
        submissions_stream=f"{prefix}.submissions",
        backfill_stream=f"{prefix}.backfill",
        verdicts_stream=f"{prefix}.verdicts",
        shadow_verdicts_stream=f"{prefix}.shadow",
        dead_letters_stream=f"{prefix}.dead",
        **changes,
    )


def diagnose(settings: Settings, folder: Path, **variables: str) -> dict[str, CheckResult]:
    """The results of the command about the stream. `variables` are further settings."""
    chosen = settings.model_dump(mode="json", include=settings.model_fields_set)
    variables |= {f"SLUICE_{name.upper()}": str(value) for name, value in chosen.items()}
    done = run_sluice_in(folder, "doctor", "--json", **variables)
    assert "Traceback" not in done.stderr.decode()
    results = {
        line["check"]: CheckResult(line["check"], line["ok"], line["detail"])
        for line in map(json.loads, done.stdout.splitlines())
        if line["check"] in CHECKS
    }
    assert list(results) == CHECKS
    return results


def wrong(results: dict[str, CheckResult]) -> list[str]:
    return [name for name, result in results.items() if not result.is_ok]


@pytest.mark.kafka
def test_new_broker_passes_and_gets_no_topic(kafka_address: str, tmp_path: Path) -> None:
    results = diagnose(make_settings(kafka_address, "doctor-new"), tmp_path)

    assert wrong(results) == []
    assert "may create those that do not exist: doctor-new.submissions" in results["stream topics"].detail
    with closing(KafkaAdminClient(bootstrap_servers=kafka_address)) as admin:
        assert not any(name.startswith("doctor-new") for name in admin.list_topics())


@pytest.mark.kafka
def test_topic_with_fewer_partitions_than_members_is_named(kafka_address: str, tmp_path: Path) -> None:
    settings = make_settings(kafka_address, "doctor-partitions", intake_max_replicas=3)
    names = [settings.submissions_stream, settings.backfill_stream, settings.verdicts_stream]
    names += [settings.shadow_verdicts_stream, settings.dead_letters_stream]
    with closing(KafkaAdminClient(bootstrap_servers=kafka_address)) as admin:
        admin.create_topics({name: {"num_partitions": 2, "replication_factor": 1} for name in names})
        admin.wait_for_topics(names)

    results = diagnose(settings, tmp_path)

    assert wrong(results) == ["stream topics"]
    assert "has 2 partitions, and up to 3 intake replicas" in results["stream topics"].detail
    assert wrong(diagnose(settings.model_copy(update={"intake_max_replicas": 2}), tmp_path)) == []


@pytest.fixture(scope="module")
def guarded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    require_kafka()
    broker = GuardedBroker(tmp_path_factory.mktemp("guarded"))
    broker.start()
    yield broker
    broker.kill()


@pytest.mark.kafka
def test_check_of_the_right_to_join_leaves_members_in_their_group(kafka_address: str, tmp_path: Path) -> None:
    settings = make_settings(kafka_address, "doctor-members")
    with closing(
        KafkaConsumer(
            settings.submissions_stream, group_id=settings.group, bootstrap_servers=kafka_address, client_id="member"
        )
    ) as consumer:
        deadline = time.monotonic() + 30
        while not consumer.assignment() and time.monotonic() < deadline:
            consumer.poll(timeout_ms=200)
        before = consumer.assignment()
        assert before

        assert wrong(diagnose(settings, tmp_path)) == []

        for _ in range(10):
            consumer.poll(timeout_ms=200)
        assert consumer.assignment() == before


def allow(admin: Any, kind: ResourceType, name: str, *operations: ACLOperation) -> None:
    """Allow these operations. Everything else on the resource is forbidden from then on."""
    pattern = ResourcePattern(kind, name)
    admin.create_acls(
        [ACL("User:ANONYMOUS", "*", operation, ACLPermissionType.ALLOW, pattern) for operation in operations]
    )


@pytest.mark.kafka
def test_each_missing_right_is_named(guarded_broker: Broker, tmp_path: Path) -> None:
    settings = make_settings(guarded_broker.address, "doctor-rights")
    topics = [settings.submissions_stream, settings.verdicts_stream, settings.dead_letters_stream]
    with closing(KafkaAdminClient(bootstrap_servers=guarded_broker.address)) as admin:
        assert wrong(diagnose(settings, tmp_path)) == []
        admin.create_topics({name: {"num_partitions": 6, "replication_factor": 1} for name in topics})
        admin.wait_for_topics(topics)
        allow(admin, ResourceType.TOPIC, settings.submissions_stream, ACLOperation.WRITE, ACLOperation.DESCRIBE)
        allow(admin, ResourceType.TOPIC, settings.verdicts_stream, ACLOperation.READ, ACLOperation.DESCRIBE)
        allow(admin, ResourceType.TOPIC, settings.dead_letters_stream, ACLOperation.DELETE)
        allow(admin, ResourceType.GROUP, settings.group, ACLOperation.DELETE)
        results = wait_for(settings, tmp_path, "stream rights", f"consumer group {settings.group}")
        missing = results["stream rights"].detail
        assert f"READ on the topic {settings.submissions_stream}" in missing
        assert f"WRITE on the topic {settings.verdicts_stream}" in missing
        assert f"WRITE on the topic {settings.dead_letters_stream}" in missing
        assert f"READ on the consumer group {settings.group}" in missing
        assert settings.shadow_verdicts_stream not in missing
        assert f"{settings.group}.backfill" not in missing


@pytest.mark.kafka
def test_missing_right_to_begin_transactions_is_named(guarded_broker: Broker, tmp_path: Path) -> None:
    settings = make_settings(guarded_broker.address, "doctor-transactions", delivery="exactly_once")
    ids = ResourcePattern(ResourceType.TRANSACTIONAL_ID, f"{settings.group}/", ACLResourcePatternType.PREFIXED)
    with closing(KafkaAdminClient(bootstrap_servers=guarded_broker.address)) as admin:
        assert wrong(diagnose(settings, tmp_path)) == []
        admin.create_acls([ACL("User:other", "*", ACLOperation.WRITE, ACLPermissionType.ALLOW, ids)])

        results = wait_for(settings, tmp_path, "stream rights", "transactional ids")

    assert wrong(results) == ["stream rights"]
    assert f"lacks WRITE on the transactional ids {settings.group}/*: grant it" in results["stream rights"].detail
    assert wrong(diagnose(settings.model_copy(update={"delivery": "at_least_once"}), tmp_path)) == []


@pytest.mark.kafka
def test_missing_right_to_create_topics_is_named(guarded_broker: Broker, tmp_path: Path) -> None:
    settings = make_settings(guarded_broker.address, "doctor-create")
    with closing(KafkaAdminClient(bootstrap_servers=guarded_broker.address)) as admin:
        allow(
            admin,
            ResourceType.CLUSTER,
            "kafka-cluster",
            *(ACLOperation.CLUSTER_ACTION, ACLOperation.DESCRIBE, ACLOperation.ALTER, ACLOperation.ALTER_CONFIGS),
        )
        allow(admin, ResourceType.TOPIC, settings.submissions_stream, ACLOperation.READ, ACLOperation.DESCRIBE)

        results = wait_for(settings, tmp_path, "stream topics", "grant the right")

    assert wrong(results) == ["stream topics"]
    assert f"{settings.submissions_stream}" in results["stream topics"].detail
    assert "grant the right to create them" in results["stream topics"].detail


def wait_for(settings: Settings, folder: Path, check: str, words: str) -> dict[str, CheckResult]:
    """Diagnose until a check says these words, because a broker applies new access control lists after a moment."""
    for _ in range(40):
        results = diagnose(settings, folder)
        if words in results[check].detail:
            break
        time.sleep(0.25)
    return results


@pytest.mark.kafka
def test_wrong_option_is_named(kafka_address: str, tmp_path: Path) -> None:
    settings = make_settings(kafka_address, "doctor-options")

    results = diagnose(settings, tmp_path, SLUICE_KAFKA_OPTIONS='{"group_id": "mine"}')

    assert wrong(results) == CHECKS
    assert "cannot set group_id" in results["stream"].detail


@pytest.mark.kafka
def test_old_release_is_named(kafka_address: str, tmp_path: Path) -> None:
    """The client speaks the protocol of the old release, as it does with an old broker."""
    settings = make_settings(kafka_address, "doctor-old")

    results = diagnose(settings, tmp_path, SLUICE_KAFKA_OPTIONS='{"api_version": "2.3"}')

    assert wrong(results) == ["stream version", "stream topics", "stream rights"]
    assert results["stream topics"].detail == "not checked, because stream version failed"
    assert "runs Kafka 2.3, and Sluice needs 2.5: upgrade the brokers" in results["stream version"].detail


@pytest.mark.server
def test_absent_broker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.doctor.kafka_checks._CONNECT_MS", 500)
    (port,) = free_ports(1)

    results = diagnose(make_settings(f"127.0.0.1:{port}", "doctor-absent"), tmp_path)

    assert wrong(results) == CHECKS
    assert f"Kafka at 127.0.0.1:{port} does not answer; start it or correct" in results["stream"].detail
    assert results["stream rights"].detail == "not checked, because stream failed"


def test_old_release_of_one_broker_is_named() -> None:
    result = check_release([(4, 0), (2, 3)])

    assert not result.is_ok
    assert "runs Kafka 2.3, and Sluice needs 2.5" in result.detail
    assert check_release([(2, 5), (4, 0)]).is_ok
