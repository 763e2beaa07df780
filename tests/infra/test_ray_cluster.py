"""ray_cluster.yaml: valid for Ray; its nodes start on an AWS simulated by moto."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from pipelines.autoscaling import serve_config
from services.core.settings import Settings
from tests.support.deployment_files import INFRA, ROOT, document

CLUSTER: Final = document(ROOT / "ray_cluster.yaml")
GPU_CLASSES: Final = ("l40s", "l4", "a10g", "a100", "h100")
ROLES: Final = sorted((INFRA / "aws").glob("sluice-*.json"))
PEOPLE: Final = {"sluice-policy-editor", "sluice-access-admin"}
"""No node may have these roles."""


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file in place of the SSH key. Ray hashes it into the identity of a node type."""
    path = tmp_path / "sluice.pem"
    path.write_text("key")
    return path


@pytest.fixture
def autoscaler(key: Path) -> AutoscalingConfig:
    """The node types as autoscaler v2 reads them."""
    prepared = prepare_config(CLUSTER)
    prepared["auth"]["ssh_private_key"] = str(key)
    return AutoscalingConfig(prepared, skip_content_hash=True)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An AWS account with a private network. Yields its identifiers by the placeholders of the file."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    region = CLUSTER["provider"]["region"]
    with mock_aws():
        ec2 = boto3.client("ec2", region)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{n}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
            for n, zone in enumerate(CLUSTER["provider"]["availability_zone"].split(","))
        ]
        group = ec2.create_security_group(GroupName="sluice", Description="nodes", VpcId=vpc)["GroupId"]
        ec2.create_key_pair(KeyName="sluice")
        iam = boto3.client("iam")
        trust = (INFRA / "aws" / "trust.json").read_text()
        for policy in ROLES:
            iam.create_role(RoleName=policy.stem, AssumeRolePolicyDocument=trust)
            iam.put_role_policy(RoleName=policy.stem, PolicyName=policy.stem, PolicyDocument=policy.read_text())
            iam.create_instance_profile(InstanceProfileName=policy.stem)
            iam.add_role_to_instance_profile(InstanceProfileName=policy.stem, RoleName=policy.stem)
        image = ec2.describe_images()["Images"][0]["ImageId"]
        yield {
            "subnet-0123456789abcdef0": subnets[0],
            "subnet-0123456789abcdef1": subnets[1],
            "sg-0123456789abcdef0": group,
            "ami-0123456789abcdef0": image,
        }


def test_cluster_file_is_valid_for_ray() -> None:
    validate_config(prepare_config(CLUSTER))


def test_head_node_has_no_cpu_for_work_and_intake_nodes_no_gpu(autoscaler: AutoscalingConfig) -> None:
    types = autoscaler.get_node_type_configs()

    assert types["head"].resources["CPU"] == 0
    assert types["head"].resources.get("GPU", 0) == 0
    assert autoscaler.get_head_node_type() == "head"
    assert types["intake"].min_worker_nodes >= 1
    assert types["intake"].resources.get("GPU", 0) == 0
    assert autoscaler.get_docker_config("intake")["image"].endswith("sluice-cpu:0.1.0")


@pytest.mark.parametrize("name", GPU_CLASSES)
def test_gpu_class_has_spot_and_on_demand_nodes_with_a_minimum_of_zero(
    name: str, autoscaler: AutoscalingConfig
) -> None:
    types = autoscaler.get_node_type_configs()
    spot, on_demand = types[f"{name}-spot"], types[name]

    assert (spot.min_worker_nodes, on_demand.min_worker_nodes) == (0, 0)
    assert spot.priority > on_demand.priority
    for node, market in ((spot, "spot"), (on_demand, "on-demand")):
        assert node.labels["ray.io/accelerator-type"] == name.upper()
        assert node.labels["ray.io/market-type"] == market
        assert node.resources["GPU"] == node.resources["CPU"] >= 1
        assert autoscaler.get_docker_config(node.name)["image"].endswith("sluice-gpu:0.1.0")


def test_guard_replicas_get_spot_nodes_of_the_open_class_first(autoscaler: AutoscalingConfig) -> None:
    reply = schedule(autoscaler, {"CPU": 1, "GPU": 1}, 20)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}

    assert launched == {"l40s-spot": 16, "l40s": 4, "intake": 2}
    assert not reply.infeasible_resource_requests


@pytest.mark.parametrize(("count", "nodes"), [(12, 4), (100, 8)])
def test_intake_replicas_get_cpu_nodes_only(count: int, nodes: int, autoscaler: AutoscalingConfig) -> None:
    """A GPU node with an intake replica would cost a GPU without a guard on it."""
    options = serve_config.intake_options(Settings())["ray_actor_options"]
    ((label, value),) = options["label_selector"].items()
    assert value.startswith("!")
    avoided = (label, LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, [value[1:]])
    reply = schedule(autoscaler, {"CPU": options["num_cpus"]}, count, [avoided])

    assert {launch.instance_type: launch.count for launch in reply.to_launch} == {"intake": nodes}


def schedule(
    autoscaler: AutoscalingConfig,
    bundle: dict[str, float],
    count: int,
    labels: Sequence[tuple[str, int, list[str]]] = (),
) -> Any:
    """The reply of autoscaler v2 to `count` actors on an empty cluster."""
    request = ResourceRequestUtil.make(bundle, label_selectors=[list(labels)] if labels else None)
    requests = ResourceRequestUtil.group_by_count([request] * count)
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=autoscaler.get_node_type_configs(),
            max_num_nodes=autoscaler.get_max_num_worker_nodes(),
            resource_requests=requests,
        )
    )


def test_every_node_type_starts_in_the_private_network(account: dict[str, str], key: Path) -> None:
    text = (ROOT / "ray_cluster.yaml").read_text(encoding="utf-8")
    for placeholder, identifier in account.items():
        text = text.replace(placeholder, identifier)
    config = prepare_config(yaml.safe_load(text))
    config["auth"]["ssh_private_key"] = str(key)

    config = bootstrap_aws(config)

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(node_type["node_config"], tags, 1)
    ec2 = boto3.client("ec2", config["provider"]["region"])
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert len(instances) == len(CLUSTER["available_node_types"]) == 3 + 2 * len(GPU_CLASSES)
    for instance in instances:
        assert not instance.get("PublicIpAddress")
        assert instance["SubnetId"] in account.values()
        assert [group["GroupId"] for group in instance["SecurityGroups"]] == [account["sg-0123456789abcdef0"]]
        # The head may start and terminate only nodes with this tag.
        assert {"Key": TAG_RAY_CLUSTER_NAME, "Value": "sluice"} in instance["Tags"]
    assert Counter(instance.get("InstanceLifecycle", "on-demand") for instance in instances) == {
        "spot": len(GPU_CLASSES),
        "on-demand": 3 + len(GPU_CLASSES),
    }


def test_node_roles_are_defined_and_the_head_may_pass_no_others() -> None:
    types = CLUSTER["available_node_types"]
    given = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in types.items()}
    head = json.loads((INFRA / "aws" / "sluice-head.json").read_text())
    (passing,) = (s for s in head["Statement"] if s["Action"] == "iam:PassRole")

    assert set(given.values()) == {policy.stem for policy in ROLES} - PEOPLE
    assert {role.rpartition("/")[2] for role in passing["Resource"]} == set(given.values()) - {given["head"]}


@pytest.mark.parametrize("policy", ROLES, ids=lambda path: path.stem)
def test_role_names_each_action_and_resource(policy: Path) -> None:
    for statement in json.loads(policy.read_text())["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        # AWS has no narrower resource for actions that describe nodes.
        if not all(action.startswith("ec2:Describe") for action in actions):
            assert statement["Resource"] != "*"


def test_every_node_requires_the_ray_token() -> None:
    types = CLUSTER["available_node_types"]
    assert "--env=RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert CLUSTER["file_mounts"] == {"/home/sluice/.ray/auth_token": "~/.ray/auth_token"}
    assert all(node["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for node in types.values())
