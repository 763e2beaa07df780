"""Serve's configuration of replicas, with and without autoscaling."""

from dataclasses import fields
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from pipelines.autoscaling import serve_config
from pipelines.autoscaling.replica_decision import Rules
from pipelines.autoscaling.serve_policy import BacklogScaling
from pipelines.serving.build import ApplicationArguments, make_deploy_schema
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from tests.support.streams_bench import Streams

AUTOSCALED: dict[str, Any] = {"guard_max_replicas": 20, "intake_max_replicas": 6}


def test_replicas_without_a_maximum_are_fixed() -> None:
    settings = Settings(guard_replicas=3, intake_replicas=2)
    assert serve_config.guard_options(settings) == {"num_replicas": 3}
    assert serve_config.intake_options(settings)["num_replicas"] == 2
    assert serve_config.gateway_options(settings)["num_replicas"] == 1
    assert serve_config.count_max_replicas(settings) == 5
    assert make_deploy_schema(settings).applications[0].autoscaling_policy is None


@pytest.mark.parametrize(("gateways", "setting", "minimum"), [(0, 0, 0), (0, 2, 2), (1, 0, 1), (1, 30, 20)])
def test_guard_minimum_with_a_gateway_is_at_least_one(gateways: int, setting: int, minimum: int) -> None:
    settings = Settings(gateway_replicas=gateways, guard_min_replicas=setting, **AUTOSCALED)
    config = AutoscalingConfig(**serve_config.guard_options(settings)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (minimum, 20)
    config = AutoscalingConfig(**serve_config.intake_options(settings)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, 6)
    if gateways:
        config = AutoscalingConfig(**serve_config.gateway_options(settings)["autoscaling_config"])
        assert (config.min_replicas, config.max_replicas) == (1, 1)
    assert serve_config.count_max_replicas(settings) == 26


def test_deploy_schema_carries_the_settings_and_the_rules() -> None:
    settings = Settings(objective_s=40, kafka_options={"sasl_mechanism": "PLAIN"}, s3_buckets=("a", "b"), **AUTOSCALED)
    (application,) = make_deploy_schema(settings).applications
    secret = {"kafka_options"}  # arguments are readable on Ray's dashboard
    arguments = ApplicationArguments(**application.args)
    assert arguments.model_dump(exclude={*secret, "from_environment"}) == settings.model_dump(exclude=secret)
    assert (arguments.kafka_options, arguments.from_environment) == ({}, ("kafka_options",))
    assert application.autoscaling_policy is not None
    rules = application.autoscaling_policy["policy_kwargs"]
    assert rules.keys() <= {each.name for each in fields(Rules)}
    assert BacklogScaling(**rules)._rules.objective_s == 40


def test_scaling_policy_of_default_settings_is_the_default_rules() -> None:
    assert Rules(**serve_config.make_autoscaling_policy(Settings())["policy_kwargs"]) == Rules()


@pytest.mark.kafka
async def test_member_id_with_several_intake_replicas_is_rejected(kafka_address: str) -> None:
    streams = Streams("at least once", f"kafka://{kafka_address}")
    with pytest.raises(ConfigurationError, match="there may be 6 intake replicas"):
        await streams.member(member_id="one", **AUTOSCALED)
