"""What Serve is told where replicas follow the backlog, and what Intake reports."""

from dataclasses import fields
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from pipelines.autoscaling import serve_config
from pipelines.autoscaling.decision import Rules
from pipelines.autoscaling.serve_policy import BacklogScaling
from pipelines.serving.build import Arguments, make_deploy_schema
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.streams.base import Lag
from tests.support.streams_bench import Streams

ELASTIC: dict[str, Any] = {"guard_max_replicas": 20, "intake_max_replicas": 6}


def test_without_a_maximum_the_numbers_stand() -> None:
    settings = Settings(guard_replicas=3, intake_replicas=2)
    assert serve_config.guard_options(settings) == {"num_replicas": 3}
    assert serve_config.intake_options(settings)["num_replicas"] == 2
    assert serve_config.gateway_options(settings)["num_replicas"] == 1
    assert serve_config.count_max_replicas(settings) == 5
    assert make_deploy_schema(settings).applications[0].autoscaling_policy is None


@pytest.mark.parametrize(("gateways", "asked", "least"), [(0, 0, 0), (0, 2, 2), (1, 0, 1), (1, 30, 20)])
def test_the_guard_goes_to_zero_where_nobody_waits_at_a_gateway(gateways: int, asked: int, least: int) -> None:
    settings = Settings(gateway_replicas=gateways, guard_min_replicas=asked, **ELASTIC)
    config = AutoscalingConfig(**serve_config.guard_options(settings)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (least, 20)
    config = AutoscalingConfig(**serve_config.intake_options(settings)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, 6)
    if gateways:
        config = AutoscalingConfig(**serve_config.gateway_options(settings)["autoscaling_config"])
        assert (config.min_replicas, config.max_replicas) == (1, 1)
    assert serve_config.count_max_replicas(settings) == 26


def test_the_plan_builds_the_application_that_the_settings_describe() -> None:
    settings = Settings(objective_s=40, kafka_options={"sasl_mechanism": "PLAIN"}, s3_buckets=("a", "b"), **ELASTIC)
    (application,) = make_deploy_schema(settings).applications
    assert Arguments(**application.args).model_dump() == settings.model_dump()
    assert application.autoscaling_policy is not None
    arguments = application.autoscaling_policy["policy_kwargs"]
    assert arguments.keys() <= {each.name for each in fields(Rules)}
    assert BacklogScaling(**arguments)._rules.objective_s == 40


def test_a_plan_that_names_no_rule_has_those_of_the_settings() -> None:
    assert Rules(**serve_config.scaling_policy(Settings())["policy_kwargs"]) == Rules()


def test_what_is_reported() -> None:
    live = Lag({0: 5, 1: 7, 2: 0}, published=90, partitions=3, held=frozenset({1, 2}))
    backfill = Lag({0: 400}, published=1000, partitions=1, held=frozenset({0}))
    assert serve_config.report({"live": live, "backfill": backfill}, at_guard=4) == {
        "at_guard": 4,
        "live_backlog": 12,
        "live_published": 90,
        "live_partitions": 3,
        "live_backlog_1": 7,
        "live_backlog_2": 0,
        "backfill_backlog": 400,
        "backfill_published": 1000,
    }


def test_what_cannot_be_read_is_not_reported() -> None:
    assert serve_config.report({}, at_guard=0) == {"at_guard": 0}


@pytest.mark.kafka
async def test_a_name_is_for_one_replica(kafka_address: str) -> None:
    streams = Streams("at least once", f"kafka://{kafka_address}")
    with pytest.raises(ConfigurationError, match="there may be 6 intake replicas"):
        await streams.member(member_id="one", **ELASTIC)
