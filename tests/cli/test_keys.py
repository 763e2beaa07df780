"""`sluice keys`, against a real S3 server; no service runs."""

import json

import pytest
from typer.testing import CliRunner

from pipelines.cli import keys
from services.core.errors import ConfigurationError
from tests.support.gateway_bench import GatewayBench


def test_created_key_is_listed_until_and_after_its_revocation(
    idle: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", idle.settings.policy_bucket)
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", idle.settings.s3_endpoint or "")

    def sluice(*arguments: str) -> list[str]:
        done = CliRunner().invoke(keys.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()

    (made,) = sluice("create", "ci", "--role", "moderate", "--tenant", "shop", "--rate", "5", "--json")
    assert json.loads(made)["key"].startswith(f"sk-sluice-{json.loads(made)['id']}-")
    (token,) = sluice("create", "ada", "--role", "admin")
    listed = [json.loads(line) for line in sluice("list", "--json")]
    assert [(each["name"], each["role"], each["tenant"], each["revoked"]) for each in listed] == [
        ("ci", "moderate", "shop", False),
        ("ada", "admin", "default", False),
    ]
    assert not any("digest" in each or token in json.dumps(each) for each in listed)
    assert sluice("revoke", listed[0]["id"]) == []
    first, second = sluice("list")
    assert "ci" in first
    assert first.endswith("moderate, tenant shop, 5/s, revoked")
    assert second.endswith("admin, tenant default")
    for wrong, word in ((("create", "x", "--role", "god"), "role"), (("revoke", "nothing"), "no API key")):
        with pytest.raises(ConfigurationError, match=word):
            sluice(*wrong)
