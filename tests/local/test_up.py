"""The parts of `sluice up` that need no cluster."""

import boto3
import pytest

from pipelines.local.up import choose_gateway_port, create_embedded_key
from services.core.settings import Settings
from services.gateway.api_keys import ApiKeyRegistry


def test_api_key_is_created_only_in_the_embedded_bucket(s3_endpoint: str) -> None:
    """A key in a bucket that outlives the process would stay valid after a SIGKILL."""
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket="embedded-key")
    settings = Settings(s3_endpoint=s3_endpoint, policy_bucket="embedded-key", gateway_replicas=1)
    keys = ApiKeyRegistry(s3, "embedded-key")

    assert create_embedded_key(settings, {"SLUICE_REDIS_URL": "redis://127.0.0.1:1/0"}) == {}
    assert keys.read_index() == {}

    created = create_embedded_key(settings, {"SLUICE_S3_ENDPOINT": s3_endpoint})
    assert created["SLUICE_API_KEY"].startswith("sk-sluice-")
    assert list(keys.read_index().values()) == [False]


def test_embedded_service_takes_a_free_port_unless_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may use the default port of the gateway, and nobody has chosen this port."""
    monkeypatch.delenv("SLUICE_GATEWAY_PORT", raising=False)
    assert choose_gateway_port(Settings(), embed=True).gateway_port == 0
    assert choose_gateway_port(Settings(), embed=False).gateway_port == 8080
    assert choose_gateway_port(Settings(ray_address="head:6379"), embed=True).gateway_port == 8080
    monkeypatch.setenv("SLUICE_GATEWAY_PORT", "9999")
    assert choose_gateway_port(Settings(), embed=True).gateway_port == 9999
