"""Every shipped deployment places its model on GPUs that hold it, and keeps what the engine compiles for them.

The memory of a GPU is AWS's own figure, which moto has for each instance type. What a model needs is that of its row.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import boto3
import pytest
from moto import mock_aws

from pipelines.autoscaling.capacity import GPU_SPECS
from services.guard import sglang_command
from services.guard.checkpoints import Checkpoint, resolve_checkpoint
from services.guard.gpu_memory import GIB
from tests.infra.test_images import instructions
from tests.infra.test_kubernetes import groups, of_kind, settings
from tests.support.deployment_files import INFRA, ROOT, document

MIB: Final = 1 << 20
OVERLAYS: Final = ("overlays/one-gpu", "overlays/production")
ROLES_WITH_STORE: Final = ("head", "intake", "gateway", "guard")
CLUSTER: Final = document(ROOT / "ray_cluster.yaml")
ARGS: Final = document(INFRA / "serve.yaml")["applications"][0]["args"]
GPU_NODES: Final = {
    name: node for name, node in CLUSTER["available_node_types"].items() if node["resources"].get("GPU", 0)
}
CACHE: Final = "/home/sluice/.cache/sglang"

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture(scope="module")
def aws_gpus() -> Iterator[dict[str, Any]]:
    """The GPU of each instance type of AWS: name, count, and memory in MiB."""
    with pytest.MonkeyPatch.context() as environment, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        pages = boto3.client("ec2", "eu-central-1").get_paginator("describe_instance_types").paginate()
        yield {
            each["InstanceType"]: each["GpuInfo"]["Gpus"][0]
            for page in pages
            for each in page["InstanceTypes"]
            if "GpuInfo" in each and each["GpuInfo"]["Gpus"][0]["Manufacturer"] == "NVIDIA"
        }


def fits(checkpoint: Checkpoint, gpu_bytes: int, guard_gpus: float) -> bool:
    """Whether a replica with this many such GPUs holds the checkpoint."""
    memory = [int(gpu_bytes * min(1.0, guard_gpus))] * max(1, int(guard_gpus))
    return checkpoint.tensor_parallel_size(memory) >= 1


def test_open_gpu_nodes_of_aws_hold_the_model_of_serve_yaml(aws_gpus: dict[str, Any]) -> None:
    checkpoint, guard_gpus = resolve_checkpoint(ARGS["model"]), float(ARGS.get("guard_gpus", 1))
    open_nodes = {name: node for name, node in GPU_NODES.items() if node["max_workers"]}

    assert open_nodes
    for name, node in open_nodes.items():
        gpu = aws_gpus[node["node_config"]["InstanceType"]]
        assert guard_gpus <= gpu["Count"], name
        assert fits(checkpoint, gpu["MemoryInfo"]["SizeInMiB"] * MIB, guard_gpus), f"{name} is too small"


@pytest.mark.parametrize("name", GPU_NODES)
def test_gpu_node_of_aws_offers_what_its_instance_has(name: str, aws_gpus: dict[str, Any]) -> None:
    node = GPU_NODES[name]
    gpu = aws_gpus[node["node_config"]["InstanceType"]]

    assert node["resources"]["GPU"] == gpu["Count"]
    assert node["labels"]["ray.io/accelerator-type"] == gpu["Name"]
    # SGLang's compiled kernels begin with Ampere.
    assert gpu["Name"] not in {"T4", "T4g", "V100", "M60", "K80", "P100"}


def smallest_gpu_bytes(pod: Any, aws_gpus: dict[str, Any]) -> int:
    """The memory of the smallest GPU of a node that the pod may be placed on; 0 if nothing bounds it."""
    if name := pod.get("nodeSelector", {}).get("karpenter.k8s.aws/instance-gpu-name"):
        return min(gpu["MemoryInfo"]["SizeInMiB"] for gpu in aws_gpus.values() if gpu["Name"].lower() == name) * MIB
    required = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    bounds = [
        [(int(each["values"][0]) + 1) * MIB for each in term["matchExpressions"] if is_memory_bound(each)]
        for term in required.get("nodeSelectorTerms", ())
    ]
    return min((max(bound, default=0) for bound in bounds), default=0)


def is_memory_bound(expression: Any) -> bool:
    return expression["key"] == "nvidia.com/gpu.memory" and expression["operator"] == "Gt"


@each_overlay
def test_guard_pods_are_placed_on_gpus_that_hold_the_model(overlay: str, aws_gpus: dict[str, Any]) -> None:
    guard = groups(overlay)["guard"]
    (container,) = guard["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    guard_gpus = float(settings(overlay).get("SLUICE_GUARD_GPUS", 1))

    assert guard_gpus <= gpus
    smallest = smallest_gpu_bytes(guard["template"]["spec"], aws_gpus)
    assert fits(resolve_checkpoint(settings(overlay)["SLUICE_MODEL"]), smallest, guard_gpus)
    # A bound that no GPU meets would be no placement either.
    assert any(spec.memory_gib * GIB >= smallest for spec in GPU_SPECS.values())


@pytest.mark.parametrize(
    ("selector", "is_enough"),
    [
        ({"nodeSelector": {"karpenter.k8s.aws/instance-gpu-name": "l4"}}, False),
        ({"nodeSelector": {"karpenter.k8s.aws/instance-gpu-name": "h100"}}, True),
        ({"nodeSelector": {"kubernetes.io/arch": "amd64"}}, False),
        ({}, False),
    ],
)
def test_placement_on_a_small_or_on_any_gpu_is_found(
    selector: dict[str, Any], is_enough: bool, aws_gpus: dict[str, Any]
) -> None:
    seven_billion = resolve_checkpoint("LlavaGuard-v1.2-7B-OV")

    assert fits(seven_billion, smallest_gpu_bytes(selector, aws_gpus), 1) is is_enough


@pytest.mark.parametrize("name", GPU_SPECS)
def test_planned_gpu_has_the_memory_that_aws_states(name: str, aws_gpus: dict[str, Any]) -> None:
    model, _, size = name.partition("-")
    sizes = {gpu["MemoryInfo"]["SizeInMiB"] / 1024 for gpu in aws_gpus.values() if gpu["Name"].lower() == model}
    nearest = min(sizes, key=lambda stated: abs(stated - GPU_SPECS[name].memory_gib))

    assert sizes
    assert GPU_SPECS[name].memory_gib == pytest.approx(nearest, rel=0.05)
    assert not size or size == f"{nearest:.0f}gb"


@each_overlay
@pytest.mark.parametrize("role", ROLES_WITH_STORE)
def test_object_store_fits_into_the_shared_memory_of_its_pod(role: str, overlay: str) -> None:
    """Ray silently puts a store that does not fit on a disk."""
    group = groups(overlay)[role]
    (shared,) = (each for each in group["template"]["spec"]["volumes"] if each["name"] == "shm")
    size = re.fullmatch(r"(\d+)Gi", shared["emptyDir"]["sizeLimit"])

    assert shared["emptyDir"]["medium"] == "Memory"
    assert size
    assert 0 < int(group["rayStartParams"]["object-store-memory"]) <= int(size[1]) * GIB


@each_overlay
def test_guard_pods_keep_compiled_kernels_on_a_volume(overlay: str) -> None:
    pod = groups(overlay)["guard"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    assert "persistentVolumeClaim" in volumes[mounts[CACHE]]
    assert not volumes[mounts[CACHE]]["persistentVolumeClaim"].get("readOnly")


@pytest.mark.parametrize("name", GPU_NODES)
def test_gpu_node_of_aws_gets_weights_once_and_kernels(name: str) -> None:
    node = GPU_NODES[name]
    mounted = dict(
        option.removeprefix("--volume=").split(":")
        for option in node["docker"]["worker_run_options"]
        if option.startswith("--volume=")
    )
    commands = " ".join(node["initialization_commands"])

    assert '--exclude "*/blobs/*"' in commands  # a cache in S3 has each file twice
    assert mounted["/opt/kernels"] == CACHE
    assert "tar --extract --directory /opt/kernels" in commands
    assert commands.index("install -d") < commands.index("tar --extract")


def test_cache_folder_is_that_of_the_engine() -> None:
    """SGLang keeps all caches of kernels in one folder below the home of the user, unless a variable names another."""
    from sglang.srt.environ import envs  # noqa: PLC0415 - slow, and only here

    assert envs.SGLANG_CACHE_DIR.get().endswith(CACHE.removeprefix("/home/sluice"))


def test_image_for_gpus_bounds_the_jobs_of_the_compiler_and_the_engine_inherits_the_bound() -> None:
    stages: dict[str, list[str]] = {}
    stage = ""
    for name, arguments in instructions():
        stage = arguments.partition(" AS ")[2] if name == "FROM" else stage
        if name == "ENV":
            stages.setdefault(stage, []).append(arguments)
    (found,) = re.findall(r"\bMAX_JOBS=(\d+)", " ".join(stages["gpu"]))

    assert 1 <= int(found) <= 8
    assert sglang_command._is_inherited("MAX_JOBS")


def test_kuberay_waits_longer_than_a_first_start_takes() -> None:
    (service,) = of_kind("base", "RayService")

    assert service["spec"]["serviceUnhealthySecondThreshold"] >= 3600
