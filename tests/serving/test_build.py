"""The application that `serve deploy` builds, without a cluster."""

import json
import uuid
from typing import Any

import boto3
import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve._private.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from pipelines.serving.build import ApplicationArguments, make_deploy_schema
from pipelines.serving.names import APPLICATION
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.policies.registry import PolicyRegistry
from tests.support.deployment_files import INFRA, document

SERVE_YAML = ServeDeploySchema.model_validate(document(INFRA / "serve.yaml"))
(DEPLOYED,) = SERVE_YAML.applications


@pytest.fixture
def arguments(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The `args` of serve.yaml, with the S3 server and a new bucket of this test."""
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", s3_endpoint)
    bucket = f"policies-{uuid.uuid4()}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return DEPLOYED.args | {"policy_bucket": bucket}


def build(arguments: dict[str, Any]) -> Any:
    """Build the application as Serve does on the cluster before it deploys anything."""
    return call_user_app_builder_with_args_if_necessary(import_attr(DEPLOYED.import_path), arguments)


def test_serve_yaml_builds_both_deployments_and_publishes_the_policy(
    arguments: dict[str, Any], s3_endpoint: str
) -> None:
    built = build_app(build(arguments), name=APPLICATION)

    assert DEPLOYED.name == APPLICATION
    assert {deployment.name for deployment in built.deployments} >= {"Intake", "Guard"}
    guard = next(deployment for deployment in built.deployments if deployment.name == "Guard")
    # The build cannot count the GPUs of nodes that start on demand.
    assert guard.ray_actor_options["num_gpus"] == 1
    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), arguments["policy_bucket"])
    assert registry.list_versions("default") == [1]


def test_import_paths_of_0_1_0_lead_to_the_same_objects() -> None:
    """Users have them in their own copies of serve.yaml and of RayService manifests."""
    policy = DEPLOYED.autoscaling_policy["policy_function"]
    for old, new in (("pipelines.serve_app:build", DEPLOYED.import_path), ("pipelines.scaling:BacklogScaling", policy)):
        assert import_attr(old) is import_attr(new)


def test_second_build_leaves_the_policies_unchanged(arguments: dict[str, Any], s3_endpoint: str) -> None:
    build(arguments)
    build(arguments)

    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), arguments["policy_bucket"])
    assert [change.action for change in registry.list_changes("default")] == ["activate"]


def test_settings_without_an_argument_come_from_the_environment(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_GROUP", "of-the-environment")
    monkeypatch.setenv("SLUICE_MODEL", "tiny")

    read = ApplicationArguments.model_validate(arguments)

    assert read.group == "of-the-environment"
    assert read.model == DEPLOYED.args["model"]


def test_unknown_setting_is_rejected(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"intake_replica\n.*not permitted"):
        build(arguments | {"intake_replica": 3})


def test_missing_setting_is_named(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_STREAM_URL", raising=False)
    del arguments["stream_url"]
    with pytest.raises(ConfigurationError, match="SLUICE_STREAM_URL not set"):
        build(arguments)


def test_unknown_checkpoint_is_rejected(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_MODEL=LlavaGuard-9"):
        build(arguments | {"model": "LlavaGuard-9"})


SECRETS = {
    "stream_url": "rediss://worker:hush@stream:6379/0",
    "redis_url": "redis://:hush@cache:6379/0",
    "kafka_options": {"sasl_plain_password": "hush", "sasl_plain_username": "sluice"},
}


def test_deployed_arguments_hold_no_credentials() -> None:
    """Serve's REST details show the whole configuration."""
    settings = Settings(**DEPLOYED.args | SECRETS | {"s3_endpoint": "http://key:hush@s3"})  # type: ignore[arg-type]

    shown = make_deploy_schema(settings).model_dump_json()

    assert "hush" not in shown
    assert "sasl" not in shown
    assert "moderation-policies" in shown
    assert "hush" not in repr(settings.model_copy(update={"s3_endpoint": None}))


def test_password_in_the_query_of_a_url_is_a_credential() -> None:
    settings = Settings(**DEPLOYED.args | {"redis_url": "redis://cache:6379/0?password=hush"})

    assert "hush" not in make_deploy_schema(settings).model_dump_json()


def test_addresses_without_credentials_stay_arguments() -> None:
    (deployed,) = make_deploy_schema(Settings(**DEPLOYED.args)).applications

    assert deployed.args["redis_url"] == DEPLOYED.args["redis_url"]
    assert "from_environment" not in deployed.args


def test_build_reads_withheld_settings_from_the_environment(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (deployed,) = make_deploy_schema(Settings(**arguments | SECRETS)).applications
    with pytest.raises(ConfigurationError, match="SLUICE_STREAM_URL, SLUICE_REDIS_URL, SLUICE_KAFKA_OPTIONS not set"):
        build(deployed.args)
    for name, value in SECRETS.items():
        monkeypatch.setenv(f"SLUICE_{name.upper()}", value if isinstance(value, str) else json.dumps(value))

    build(deployed.args)

    read = ApplicationArguments.model_validate(deployed.args)
    assert {name: getattr(read, name) for name in SECRETS} == SECRETS


def test_credentials_in_arguments_are_warned_of_without_their_value(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    build(arguments | {"redis_url": SECRETS["redis_url"]})

    assert "the argument redis_url holds credentials" in caplog.text
    assert "hush" not in caplog.text


def test_error_of_a_misspelled_setting_hides_its_value(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        build(arguments | {"redis_ur": SECRETS["redis_url"]})
    assert "hush" not in str(raised.value)
