"""The Kubernetes manifests, rendered by kustomize and checked without a cluster."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.autoscaling.serve_config import make_autoscaling_policy
from pipelines.serving.build import ApplicationArguments
from services.core.settings import Settings
from services.images.decoder_limits import decoder_memory_bytes
from tests.support.deployment_files import INFRA, ROOT, document

FOLDER: Final = INFRA / "kubernetes"
OVERLAYS: Final = ("base", "overlays/one-gpu", "overlays/production")
RAYSERVICE: Final = json.loads((FOLDER / "schemas" / "rayservice-v1.json").read_text())
ROLES: Final = {"head", "intake", "gateway", "guard"}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def rendered(overlay: str) -> list[Any]:
    """Every object of an overlay, as `kubectl apply -k` sends it."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    assert kubectl
    done = subprocess.run([kubectl, "kustomize", str(FOLDER / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Any]:
    return [each for each in rendered(overlay) if each["kind"] == kind]


def cluster(overlay: str) -> Any:
    (service,) = of_kind(overlay, "RayService")
    return service["spec"]["rayClusterConfig"]


def groups(overlay: str) -> dict[str, Any]:
    """The head and the groups of workers, by role."""
    config = cluster(overlay)
    return {"head": config["headGroupSpec"]} | {group["groupName"]: group for group in config["workerGroupSpecs"]}


def settings(overlay: str) -> dict[str, str]:
    """The settings in the ConfigMap: all but the secret ones."""
    (found,) = of_kind(overlay, "ConfigMap")
    return {str(name): str(value) for name, value in found["data"].items()}


@each_overlay
def test_manifests_match_the_kubernetes_schema(overlay: str) -> None:
    version = kubernetes_validate.latest_version()
    for each in rendered(overlay):
        if each["kind"] != "RayService":
            kubernetes_validate.validate(each, version, strict=True)
    for role, group in groups(overlay).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


@each_overlay
def test_rayservice_matches_the_kuberay_schema(overlay: str) -> None:
    (service,) = of_kind(overlay, "RayService")
    jsonschema.Draft202012Validator(RAYSERVICE).validate(service)


def test_unknown_field_violates_the_kuberay_schema() -> None:
    (service,) = json.loads(json.dumps(of_kind("base", "RayService")))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["livenesProbe"] = {}

    with pytest.raises(jsonschema.ValidationError, match="livenesProbe"):
        jsonschema.Draft202012Validator(RAYSERVICE).validate(service)


@each_overlay
def test_rayservice_deploys_the_application_of_serve_yaml(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (service,) = of_kind(overlay, "RayService")
    (here,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    (there,) = ServeDeploySchema.model_validate(document(INFRA / "serve.yaml")).applications

    for applied in (here, there):
        assert (applied.name, applied.route_prefix) == ("sluice", None)
        assert applied.import_path == "pipelines.serving.build:build"
    assert here.args == {}, "settings come from the environment of the head"
    for name, value in settings(overlay).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLUICE_REDIS_URL", "redis://of-the-secret:6379/0")
    read = ApplicationArguments.model_validate(here.args)
    wanted = make_autoscaling_policy(read)
    assert here.autoscaling_policy
    assert here.autoscaling_policy["policy_function"] == wanted["policy_function"]
    assert here.autoscaling_policy["policy_kwargs"].items() <= wanted["policy_kwargs"].items()


@each_overlay
def test_pod_bounds_match_the_replica_settings(overlay: str) -> None:
    configured, found = settings(overlay), groups(overlay)

    assert set(found) == ROLES
    assert found["head"]["resources"] == {"CPU": "0"}
    assert found["intake"]["minReplicas"] == int(configured["SLUICE_INTAKE_REPLICAS"])
    assert found["intake"]["maxReplicas"] == int(configured["SLUICE_INTAKE_MAX_REPLICAS"])
    assert found["guard"]["minReplicas"] == int(configured["SLUICE_GUARD_MIN_REPLICAS"])
    assert found["guard"]["maxReplicas"] == int(configured["SLUICE_GUARD_MAX_REPLICAS"])
    assert found["gateway"]["minReplicas"] == int(configured["SLUICE_GATEWAY_REPLICAS"])
    for role in ("intake", "gateway", "guard"):
        assert found[role]["minReplicas"] <= found[role]["replicas"] <= found[role]["maxReplicas"]


@each_overlay
def test_pods_have_probes_memory_limits_and_no_root(overlay: str) -> None:
    for role, group in groups(overlay).items():
        pod = group["template"]["spec"]
        assert group["template"]["metadata"]["labels"]["sluice.io/role"] == group["labels"]["sluice.io/role"] == role
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # Ray's autoscaler deletes the pods. It would not know a pod that Kubernetes restarted.
        assert "restartPolicy" not in pod
        (container,) = pod["containers"]
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"].endswith("sluice-gpu:0.1.0" if role == "guard" else "sluice-cpu:0.1.0")
        assert {"name": "metrics", "containerPort": int(group["rayStartParams"]["metrics-export-port"])} in container[
            "ports"
        ]
        assert pod["terminationGracePeriodSeconds"] > ApplicationArguments.model_fields["drain_s"].default


@each_overlay
def test_head_keeps_its_state_in_redis_and_requires_a_token(overlay: str) -> None:
    config = cluster(overlay)

    assert config["authOptions"] == {"mode": "token", "secretName": "sluice-ray-token"}
    assert config["gcsFaultToleranceOptions"]["redisAddress"]
    assert "value" not in config["gcsFaultToleranceOptions"]["redisPassword"]
    # With one namespace, the two clusters of an upgrade would share their state.
    assert "externalStorageNamespace" not in config["gcsFaultToleranceOptions"]
    assert config["autoscalerOptions"]["version"] == "v2"
    assert config["autoscalerOptions"]["idleTimeoutSeconds"] > 0


@each_overlay
def test_manifests_contain_no_secret_and_the_docs_list_each_needed_one(overlay: str) -> None:
    assert not of_kind(overlay, "Secret")
    docs = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    named = set(secrets(rendered(overlay)))

    assert "sluice-settings" in named
    assert {name for name in named if f"`{name}`" not in docs} == set()


@each_overlay
def test_guard_pods_get_no_settings_and_no_kubernetes_token(overlay: str) -> None:
    guard = groups(overlay)["guard"]["template"]["spec"]
    accounts = {each["metadata"]["name"]: each for each in of_kind(overlay, "ServiceAccount")}

    assert set(secrets(guard)) <= {"sluice-hub"}
    assert "envFrom" not in guard["containers"][0]
    assert accounts[guard["serviceAccountName"]]["automountServiceAccountToken"] is False


RAY_AND_REPLICA_BYTES: Final = 768 << 20
"""Ray's processes of a node and a replica at rest, as docs/deployment.md says."""


@each_overlay
@pytest.mark.parametrize("role", ["intake", "gateway"])
def test_memory_of_pods_fits_their_decoders_and_images(overlay: str, role: str) -> None:
    """All decoders at their limit, all images and all request bodies at the same time are no reason for a kill."""
    (container,) = groups(overlay)[role]["template"]["spec"]["containers"]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    own = Settings.model_validate(
        {name.removeprefix("SLUICE_").lower(): value for name, value in settings(overlay).items()}
        | {"s3_buckets": ["uploads"]}
    )
    decoders = own.decode_workers * decoder_memory_bytes(own.image_limit_px, own.decode_workers, limit)
    bodies = own.gateway_body_memory_bytes if role == "gateway" else 0
    assert decoders + own.image_memory_bytes + bodies + RAY_AND_REPLICA_BYTES <= limit


@each_overlay
def test_each_role_has_an_account_of_its_own(overlay: str) -> None:
    """Only Gateway's account can read API keys."""
    accounts = {role: group["template"]["spec"]["serviceAccountName"] for role, group in groups(overlay).items()}

    assert accounts == {role: f"sluice-{role}" for role in ROLES}
    for account in of_kind(overlay, "ServiceAccount"):
        for arn in account["metadata"].get("annotations", {}).values():
            assert arn.endswith(f":role/{account['metadata']['name']}")


def secrets(node: Any) -> Iterator[str]:
    """The names of the secrets that a node or its children refer to."""
    if isinstance(node, list):
        for each in node:
            yield from secrets(each)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "secretName":
                yield value
            elif key in ("secretKeyRef", "secretRef"):
                yield value["name"]
            else:
                yield from secrets(value)


@each_overlay
def test_selectors_match_existing_pods(overlay: str) -> None:
    pods = [group["template"]["metadata"]["labels"] for group in groups(overlay).values()]
    pods += [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(overlay, "StatefulSet")]
    selectors = [each["spec"]["selector"]["matchLabels"] for each in of_kind(overlay, "PodDisruptionBudget")]
    selectors += [each["spec"]["selector"] for each in of_kind(overlay, "Service")]
    for policy in of_kind(overlay, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        selectors.append(selector.get("matchLabels", {}))
        for expression in selector.get("matchExpressions", ()):
            assert expression["key"] == "sluice.io/role"
            assert set(expression.get("values", ())) <= ROLES

    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods), selector


@each_overlay
def test_network_policies_deny_all_other_traffic(overlay: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "NetworkPolicy")}

    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert ("guards-to-the-hub" in policies) == (overlay != "overlays/production")


@each_overlay
def test_only_pods_of_the_cluster_reach_the_ports_of_ray(overlay: str) -> None:
    """A call without a token can end Ray's processes, so other pods must not reach them."""
    cluster = {"podSelector": {"matchExpressions": [{"key": "sluice.io/role", "operator": "Exists"}]}}
    from_others: dict[str, set[int]] = {}
    for policy in of_kind(overlay, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if selector.get("matchLabels", {}).get("sluice.io/role", "head") not in ROLES:
            continue
        for rule in policy["spec"].get("ingress", ()):
            if rule.get("from") != [cluster]:
                ports = {each["port"] for each in rule["ports"]}
                from_others.setdefault(policy["metadata"]["name"], set()).update(ports)
    assert (
        from_others.items()
        <= {
            "metrics-to-prometheus": {8090},
            "head-to-operator-and-kubernetes": {8265, 52365},
            "gateway-to-clients": {8080},
            "valkey": {6379},
        }.items()
    )


@each_overlay
def test_changed_setting_changes_the_name_of_the_config_map(overlay: str) -> None:
    (generated,) = of_kind(overlay, "ConfigMap")
    (container,) = groups(overlay)["head"]["template"]["spec"]["containers"]

    assert generated["metadata"]["name"] != "sluice-settings", "the name has no hash of the content"
    assert {"configMapRef": {"name": generated["metadata"]["name"]}} in container["envFrom"]


def test_name_references_are_equal_in_all_overlays() -> None:
    texts = {(FOLDER / overlay / "names.yaml").read_text() for overlay in OVERLAYS}
    assert len(texts) == 1
