"""The application as `serve deploy` builds it, without a cluster."""

import uuid
from typing import Any

import boto3
import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve._private.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from pipelines.serving.build import Arguments
from pipelines.serving.names import APPLICATION
from services.core.errors import ConfigurationError
from services.policies.registry import PolicyRegistry
from tests.support.deployment_files import INFRA, document

SERVE_YAML = ServeDeploySchema.model_validate(document(INFRA / "serve.yaml"))
(DEPLOYED,) = SERVE_YAML.applications


@pytest.fixture
def arguments(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of serve.yaml, but for an S3 server that is there."""
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", s3_endpoint)
    bucket = f"policies-{uuid.uuid4()}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return DEPLOYED.args | {"policy_bucket": bucket}


def build(arguments: dict[str, Any]) -> Any:
    """What Serve does on the cluster before it deploys anything."""
    return call_user_app_builder_with_args_if_necessary(import_attr(DEPLOYED.import_path), arguments)


def test_serve_yaml_builds_the_same_application_as_up_does(arguments: dict[str, Any], s3_endpoint: str) -> None:
    built = build_app(build(arguments), name=APPLICATION)

    assert DEPLOYED.name == APPLICATION
    assert {deployment.name for deployment in built.deployments} >= {"Intake", "Guard"}
    guard = next(deployment for deployment in built.deployments if deployment.name == "Guard")
    # GPU nodes that come on demand are not there to be counted when the application is built.
    assert guard.ray_actor_options["num_gpus"] == 1
    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), arguments["policy_bucket"])
    assert registry.versions("default") == [1]


def test_building_again_leaves_the_policies_alone(arguments: dict[str, Any], s3_endpoint: str) -> None:
    build(arguments)
    build(arguments)

    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), arguments["policy_bucket"])
    assert [change.action for change in registry.history("default")] == ["activate"]


def test_settings_come_from_the_environment_too(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_GROUP", "of-the-environment")
    monkeypatch.setenv("SLUICE_MODEL", "tiny")

    read = Arguments.model_validate(arguments)

    assert read.group == "of-the-environment"
    assert read.model == DEPLOYED.args["model"]


def test_a_setting_that_does_not_exist_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"intake_replica\n.*not permitted"):
        build(arguments | {"intake_replica": 3})


def test_what_is_missing_is_named(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_STREAM_URL", raising=False)
    del arguments["stream_url"]
    with pytest.raises(ConfigurationError, match="SLUICE_STREAM_URL not set"):
        build(arguments)


def test_a_checkpoint_that_does_not_exist_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_MODEL=LlavaGuard-9"):
        build(arguments | {"model": "LlavaGuard-9"})
