"""`sluice doctor` on real backends: everything is right, and then each dependency is broken in turn."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pynvml
import pytest
import redis

from pipelines.doctor import machine_checks, model_checks
from services.guard import preflight
from services.guard.gpu_memory import GIB
from services.guard.preflight import Gpu
from services.images.decoder_sandbox import MEASURES
from services.policies.document import BUILT_IN
from services.policies.registry import PolicyRegistry
from tests.support.command_line import SLUICE, assert_fails, run_sluice_in, start_sluice
from tests.support.model_hub import MODEL, Hub
from tests.support.nvidia import Driver, write_program
from tests.support.ports import free_ports
from tests.support.s3_proxy import Headers, Spoiler, spoil
from tests.support.servers import Valkey

pytestmark = pytest.mark.server

CHECKS = [
    *("settings", "stream", "stream version", "stream topics", "stream rights"),
    *("redis", "redis persistence", "redis eviction"),
    *("buckets", "policy bucket", "policy bucket writes", "clock"),
    *("model", "model disk"),
    *("gpu", "gpu driver", "gpu capability", "gpu toolkit", "gpu compiler", "gpu python headers", "model memory"),
    *("ports", "file limits"),
    *("sandbox capabilities", "sandbox no_new_privs", "sandbox landlock", "sandbox seccomp", "sandbox rlimits"),
]


class Deployment:
    """The backends of one test, and the settings that name them."""

    def __init__(self, folder: Path, endpoint: str, valkey: Valkey) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.valkey = valkey
        self.s3: Any = boto3.client("s3", endpoint_url=endpoint)
        name = uuid.uuid4().hex
        self.uploads, self.policies = f"uploads-{name}", f"policies-{name}"
        for bucket in (self.uploads, self.policies):
            self.s3.create_bucket(Bucket=bucket)
        (port,) = free_ports(1)
        self.variables = {
            "SLUICE_STREAM_URL": valkey.url,
            "SLUICE_REDIS_URL": valkey.url,
            "SLUICE_S3_ENDPOINT": endpoint,
            "SLUICE_S3_BUCKETS": self.uploads,
            "SLUICE_POLICY_BUCKET": self.policies,
            "SLUICE_MODEL": "tiny",
            "SLUICE_STATE_DIR": str(folder / "state"),
            "SLUICE_GATEWAY_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def diagnose(self, **variables: str) -> dict[str, str]:
        """The details of the checks that failed, by their names. An empty variable is unset."""
        done = run_sluice_in(self.folder, "doctor", "--json", **self.variables | variables)
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert [result["check"] for result in results] == CHECKS
        assert all(set(result) == {"check", "ok", "detail"} and result["detail"] for result in results)
        problems = {result["check"]: result["detail"] for result in results if not result["ok"]}
        assert done.returncode == (1 if problems else 0)
        assert b"Traceback" not in done.stderr
        return problems


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path / "valkey")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def deployment(tmp_path: Path, s3_endpoint: str, valkey: Valkey) -> Deployment:
    return Deployment(tmp_path, s3_endpoint, valkey)


@pytest.fixture
def admin(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


def test_sound_deployment_passes_every_check(deployment: Deployment) -> None:
    assert deployment.diagnose() == {}
    # The probe of conditional writes is gone again, so the bucket still has no policy.
    assert "Contents" not in deployment.s3.list_objects_v2(Bucket=deployment.policies)


def test_bucket_with_policies_is_left_as_it_is(deployment: Deployment) -> None:
    registry = PolicyRegistry(deployment.s3, deployment.policies)
    registry.publish_built_in()
    before = deployment.s3.list_objects_v2(Bucket=deployment.policies)["Contents"]

    assert deployment.diagnose() == {}

    after = deployment.s3.list_objects_v2(Bucket=deployment.policies)["Contents"]
    assert [(each["Key"], each["ETag"], each["LastModified"]) for each in before] == [
        (each["Key"], each["ETag"], each["LastModified"]) for each in after
    ]
    assert registry.get("default", 1).document == BUILT_IN


def test_lines_for_people_name_each_check_and_stderr_counts_the_failures(deployment: Deployment) -> None:
    variables = deployment.variables | {"SLUICE_S3_BUCKETS": "absent-bucket"}

    done = run_sluice_in(deployment.folder, "doctor", **variables)

    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(CHECKS)
    (wrong,) = [line for line in lines if line.startswith("WRONG")]
    assert "the bucket absent-bucket does not exist" in wrong
    assert (done.returncode, done.stderr) == (1, b"1 check failed\n")


@pytest.mark.parametrize(
    ("setting", "checks"),
    [
        ("SLUICE_STREAM_URL", ["stream", "stream version", "stream topics", "stream rights"]),
        ("SLUICE_REDIS_URL", ["redis", "redis persistence", "redis eviction"]),
        ("SLUICE_S3_BUCKETS", ["buckets"]),
        ("SLUICE_POLICY_BUCKET", ["policy bucket", "policy bucket writes", "clock"]),
        ("SLUICE_MODEL", ["model", "model disk", "model memory"]),
    ],
)
def test_missing_setting_is_named_by_each_check_that_needs_it(
    setting: str, checks: list[str], deployment: Deployment
) -> None:
    problems = deployment.diagnose(**{setting: ""})

    assert list(problems) == ["settings", *checks]
    assert all(setting in detail for detail in problems.values())


@pytest.mark.parametrize(
    ("setting", "value", "checks"),
    [
        ("SLUICE_STREAM_URL", "http://broker", ["stream", "stream version", "stream topics", "stream rights"]),
        ("SLUICE_KAFKA_OPTIONS", "{", []),
        ("SLUICE_IN_FLIGHT", "many", []),
        ("sluice_in_flight", "many", []),
    ],
)
def test_wrong_setting_is_named_and_other_checks_run(
    setting: str, value: str, checks: list[str], deployment: Deployment
) -> None:
    problems = deployment.diagnose(**{setting: value})

    assert list(problems) == ["settings", *checks]
    assert all(setting.upper() in detail for detail in problems.values())


def test_redis_that_is_down_is_named_by_redis_and_stream(deployment: Deployment, valkey: Valkey) -> None:
    valkey.kill()

    problems = deployment.diagnose()

    assert list(problems) == CHECKS[1:8]
    assert "SLUICE_STREAM_URL" in problems["stream"]
    assert "SLUICE_REDIS_URL" in problems["redis"]
    assert problems["redis eviction"] == "not checked, because redis failed"


def test_redis_without_persistence_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    admin.config_set("appendonly", "no")

    problems = deployment.diagnose()

    assert list(problems) == ["stream topics", "redis persistence"]
    assert "submissions that wait would be lost" in problems["stream topics"]
    assert "appendonly yes" in problems["redis persistence"]


def test_redis_without_persistence_is_enough_without_a_gateway_and_a_stream(
    deployment: Deployment, admin: redis.Redis
) -> None:
    admin.config_set("appendonly", "no")

    assert list(deployment.diagnose(SLUICE_GATEWAY_REPLICAS="0")) == ["stream topics"]


def test_redis_that_evicts_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    admin.config_set("maxmemory-policy", "allkeys-lru")

    problems = deployment.diagnose()

    assert list(problems) == ["stream topics", "redis eviction"]
    assert all("allkeys-lru" in detail and "noeviction" in detail for detail in problems.values())


def test_redis_that_is_full_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    admin.config_set("maxmemory", "1")
    try:
        problems = deployment.diagnose()
    finally:
        admin.config_set("maxmemory", "0")

    assert "raise its maxmemory" in problems["redis"]


def test_read_only_redis_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    (port,) = free_ports(1)
    admin.execute_command("REPLICAOF", "127.0.0.1", port)

    assert "read-only replica" in deployment.diagnose()["redis"]


def test_user_without_a_command_of_streams_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "sluice", "on", ">pass", "~*", "+@all", "-xautoclaim")
    url = deployment.valkey.url.replace("redis://", "redis://sluice:pass@")

    problems = deployment.diagnose(SLUICE_STREAM_URL=url)

    assert list(problems) == ["stream rights"]
    assert "may not run XAUTOCLAIM" in problems["stream rights"]
    wrong = deployment.diagnose(SLUICE_REDIS_URL=url.replace(":pass@", ":other@"))
    assert "correct the password" in wrong["redis"]
    assert "other" not in wrong["redis"]


def test_user_without_dangerous_commands_passes(deployment: Deployment, admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "sluice", "on", ">pass", "~*", "+@all", "-@dangerous")
    url = deployment.valkey.url.replace("redis://", "redis://sluice:pass@")

    assert deployment.diagnose(SLUICE_STREAM_URL=url, SLUICE_REDIS_URL=url) == {}


def test_checks_of_streams_write_nothing(deployment: Deployment, admin: redis.Redis) -> None:
    admin.xadd("sluice.submissions", {"value": "{}"})
    admin.xadd("sluice.verdicts", {"value": "{}"})

    assert deployment.diagnose() == {}

    assert (admin.xlen("sluice.submissions"), admin.xlen("sluice.verdicts")) == (1, 1)
    assert admin.xinfo_groups("sluice.submissions") == []


def test_key_of_another_kind_in_place_of_a_stream_is_named(deployment: Deployment, admin: redis.Redis) -> None:
    admin.set("sluice.verdicts", "text")

    assert "sluice.verdicts is a string" in deployment.diagnose()["stream topics"]


def test_absent_buckets_are_named(deployment: Deployment) -> None:
    problems = deployment.diagnose(SLUICE_S3_BUCKETS="absent-one,absent-two", SLUICE_POLICY_BUCKET="absent-three")

    assert "absent-one does not exist" in problems["buckets"]
    assert "absent-two does not exist" in problems["buckets"]
    assert "absent-three does not exist: create it" in problems["policy bucket"]


def test_object_store_that_is_down_is_named(deployment: Deployment) -> None:
    (port,) = free_ports(1)

    problems = deployment.diagnose(SLUICE_S3_ENDPOINT=f"http://127.0.0.1:{port}")

    assert list(problems) == ["buckets", "policy bucket", "policy bucket writes", "clock"]
    assert all("SLUICE_S3_ENDPOINT" in problems[check] for check in ("buckets", "policy bucket"))


def test_object_store_without_conditional_writes_is_named(deployment: Deployment) -> None:
    class Unconditional(Spoiler):
        def change_request(self, headers: Headers) -> None:
            headers.pop("If-None-Match", None)

    PolicyRegistry(deployment.s3, deployment.policies).publish_built_in()
    with spoil(deployment.endpoint, Unconditional()) as url:
        problems = deployment.diagnose(SLUICE_S3_ENDPOINT=url)

    assert list(problems) == ["policy bucket writes"]
    assert "ignores the condition If-None-Match" in problems["policy bucket writes"]
    assert PolicyRegistry(deployment.s3, deployment.policies).get("default", 1).document == BUILT_IN


@pytest.mark.parametrize(
    ("method", "check"), [("PUT", "policy bucket writes"), ("GET", "buckets"), ("GET", "policy bucket")]
)
def test_denied_right_is_named(method: str, check: str, deployment: Deployment) -> None:
    class Denying(Spoiler):
        def refuse(self, used: str, path: str) -> str:
            bucket = deployment.uploads if check == "buckets" else deployment.policies
            return "AccessDenied" if used == method and path.startswith(f"/{bucket}") else ""

    PolicyRegistry(deployment.s3, deployment.policies).publish_built_in()
    with spoil(deployment.endpoint, Denying()) as url:
        problems = deployment.diagnose(SLUICE_S3_ENDPOINT=url)

    assert "AccessDenied" in problems[check]
    assert {"buckets": "buckets" in problems, "policy bucket": "policy bucket" in problems} == {
        "buckets": check == "buckets",
        "policy bucket": check == "policy bucket",
    }


@pytest.mark.parametrize(("hours", "words"), [(-1, "ahead of"), (1, "behind")])
def test_clock_that_differs_from_the_object_store_is_named(hours: int, words: str, deployment: Deployment) -> None:
    class InAnotherTime(Spoiler):
        def change_answer(self, headers: Headers) -> None:
            headers["Date"] = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)

    with spoil(deployment.endpoint, InAnotherTime()) as url:
        problems = deployment.diagnose(SLUICE_S3_ENDPOINT=url)

    assert list(problems) == ["clock"]
    assert words in problems["clock"]


def test_missing_credentials_are_named(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    unset = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    files = dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"), str(tmp_path / "absent"))

    problems = deployment.diagnose(**unset, **files, AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1")

    assert list(problems) == ["buckets", "policy bucket", "policy bucket writes", "clock"]
    for check in ("buckets", "policy bucket"):
        assert problems[check].startswith("there are no usable AWS credentials: NoCredentialsError")
        assert "set AWS_PROFILE" in problems[check]


def test_refused_credentials_are_named(deployment: Deployment) -> None:
    class Expired(Spoiler):
        def refuse(self, used: str, path: str) -> str:
            return "RequestTimeTooSkewed"

    with spoil(deployment.endpoint, Expired()) as url:
        problems = deployment.diagnose(SLUICE_S3_ENDPOINT=url)

    assert "correct the AWS credentials, clock or region" in problems["policy bucket"]


def test_port_of_another_server_is_named_and_a_gateway_is_not(deployment: Deployment) -> None:
    class Gateway(Spoiler):
        pass

    with spoil(deployment.endpoint, Gateway()) as url:  # any server
        problems = deployment.diagnose(SLUICE_GATEWAY_PORT=url.rpartition(":")[2])

    assert list(problems) == ["ports"]
    assert "SLUICE_GATEWAY_PORT" in problems["ports"]


def test_unknown_model_and_damaged_folder_are_named(deployment: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlavaQwenForCausalLM"], "hidden_size": 896}')

    assert "neither a folder" in deployment.diagnose(SLUICE_MODEL="gpt")["model"]
    assert "holds no weights" in deployment.diagnose(SLUICE_MODEL=str(folder))["model"]


def test_model_that_is_too_large_for_the_cpu_is_named(deployment: Deployment) -> None:
    problems = deployment.diagnose(SLUICE_MODEL="LlavaGuard-v1.2-7B-OV", HF_HUB_OFFLINE="1")

    assert "too many for a CPU" in problems["model memory"]


@pytest.mark.kafka
def test_sound_deployment_with_kafka_passes_every_check(deployment: Deployment, kafka_address: str) -> None:
    assert deployment.diagnose(SLUICE_STREAM_URL=f"kafka://{kafka_address}") == {}


class TestModel:
    """A model from a hub on loopback, on a machine with enough memory for it unless the test says otherwise."""

    @pytest.fixture(autouse=True)
    def _large_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_checks, "find_memory_bytes", lambda: 64 * GIB)

    @pytest.mark.usefixtures("model_hub")
    def test_model_that_can_be_downloaded_passes(self, deployment: Deployment) -> None:
        assert deployment.diagnose(SLUICE_MODEL=MODEL) == {}

    def test_gated_model_is_named(self, deployment: Deployment, model_hub: Hub) -> None:
        model_hub.refused[MODEL] = (403, "GatedRepo")

        problems = deployment.diagnose(SLUICE_MODEL=MODEL)

        assert list(problems) == ["model", "model disk"]
        assert f"{MODEL} is gated: accept its terms on huggingface.co" in problems["model"]

    @pytest.mark.usefixtures("model_hub")
    def test_full_disk_is_named(self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))

        problems = deployment.diagnose(SLUICE_MODEL=MODEL)

        assert list(problems) == ["model disk"]
        assert "has 1.0 GiB free" in problems["model disk"]

    @pytest.mark.usefixtures("model_hub")
    def test_small_memory_is_named(self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_checks, "find_memory_bytes", lambda: 4 * GIB)

        problems = deployment.diagnose(SLUICE_MODEL=MODEL)

        assert list(problems) == ["model memory"]
        assert "there are 4 GiB" in problems["model memory"]


class TestGpu:
    """A machine with a pretended driver and GPU, and with tools that are scripts."""

    @pytest.fixture
    def on_gpu(self, deployment: Deployment, nvidia_driver: Driver, gpu_tools: dict[str, str]) -> Deployment:
        assert nvidia_driver.gpus
        deployment.variables |= gpu_tools | {"CUDA_VISIBLE_DEVICES": "0"}
        return deployment

    def test_complete_machine_passes_every_check(self, on_gpu: Deployment) -> None:
        assert on_gpu.diagnose() == {}

    def test_old_driver_is_named(
        self, on_gpu: Deployment, nvidia_driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvidia_driver.version = "570.172.08"
        monkeypatch.setattr(preflight, "is_cuda_available", lambda: False)

        problems = on_gpu.diagnose()

        assert list(problems) == ["gpu driver"]
        assert "570.172.08 is too old for CUDA 13" in problems["gpu driver"]

    def test_driver_that_does_not_answer_is_named(
        self, on_gpu: Deployment, nvidia_driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvidia_driver.error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
        monkeypatch.setattr(preflight, "has_nvidia_gpu", lambda: True)

        assert "Driver Not Loaded" in on_gpu.diagnose(SLUICE_GUARD_GPUS="1")["gpu"]

    def test_gpu_that_is_too_old_or_too_small_is_named(self, on_gpu: Deployment, nvidia_driver: Driver) -> None:
        nvidia_driver.gpus = [Gpu("Tesla T4", GIB, (7, 5))]

        problems = on_gpu.diagnose()

        assert list(problems) == ["gpu capability", "model memory"]
        assert "Tesla T4 has the compute capability 7.5" in problems["gpu capability"]
        assert "a guard has 1 GiB" in problems["model memory"]

    @pytest.mark.parametrize(
        ("program", "check", "words"),
        [
            ("cuda/bin/nvcc", "gpu toolkit", "nvcc is not installed"),
            ("bin/c++", "gpu compiler", "a C++ compiler is not installed"),
        ],
    )
    def test_missing_program_is_named(
        self, program: str, check: str, words: str, on_gpu: Deployment, tmp_path: Path
    ) -> None:
        (tmp_path / program).unlink()

        problems = on_gpu.diagnose()

        assert list(problems) == [check]
        assert words in problems[check]

    def test_toolkit_of_another_release_is_named(self, on_gpu: Deployment, tmp_path: Path) -> None:
        write_program(tmp_path / "cuda" / "bin" / "nvcc", 'echo "Cuda compilation tools, release 12.9, V12.9.41"')

        assert "is of CUDA 12.9, and the engine needs CUDA 13" in on_gpu.diagnose()["gpu toolkit"]

    def test_missing_headers_of_python_are_named(self, on_gpu: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "find_python_header", lambda: "")

        problems = on_gpu.diagnose()

        assert list(problems) == ["gpu python headers"]
        assert "-dev" in problems["gpu python headers"]


@pytest.mark.parametrize("layer", MEASURES)
def test_missing_layer_of_the_sandbox_is_named(
    layer: str, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = f"from services.images.decoder_sandbox import enter; print(*(m for m in enter() if m != {layer!r}))"
    monkeypatch.setattr(machine_checks, "_MEASURE_SANDBOX", measure)

    assert list(deployment.diagnose()) == [f"sandbox {layer}"]


def test_low_limit_of_open_files_is_named(tmp_path: Path) -> None:
    """In a child process, because a limit that was lowered cannot be raised again."""
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 1000 && exec {SLUICE} doctor --json"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")},
        capture_output=True,
        check=False,
    )

    results = {result["check"]: result["detail"] for result in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1
    assert list(results) == CHECKS
    assert "a process may open 1000 files, and Sluice needs 4096" in results["file limits"]


def test_up_stops_before_it_waits_for_backends_if_the_machine_cannot_run_the_service(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    variables = {
        "SLUICE_STREAM_URL": f"redis://127.0.0.1:{port}/0",
        "SLUICE_REDIS_URL": f"redis://127.0.0.1:{port}/0",
        "SLUICE_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "SLUICE_S3_BUCKETS": "uploads",
        "SLUICE_POLICY_BUCKET": "policies",
        "SLUICE_MODEL": "LlavaGuard-v1.2-7B-OV",
        "SLUICE_GATEWAY_HOST": "192.0.2.1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    done = start_sluice("up", folder=tmp_path, **variables)

    assert_fails(done, "this machine cannot run the service: ", "too many for a CPU", "set SLUICE_GATEWAY_HOST")
    assert len(done.stderr.splitlines()) == 1
