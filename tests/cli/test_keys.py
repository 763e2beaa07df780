"""`sluice keys`, against a real S3 server; no service runs."""

import json

import pytest
from typer.testing import CliRunner

from pipelines.cli import keys
from services.core.errors import ConfigurationError
from services.gateway import api_keys
from services.gateway.api_keys import ApiKeyRegistry
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


def test_scope_of_a_key_is_stored_listed_and_checked(idle: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", idle.settings.policy_bucket)
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", idle.settings.s3_endpoint or "")
    monkeypatch.setenv("SLUICE_TENANT_PREFIXES", "shop=s3://uploads/shop/")

    def sluice(*arguments: str) -> tuple[str, str]:
        done = CliRunner().invoke(keys.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    scope = ("--prefix", "s3://uploads/shop/a/", "--prefix", "s3://uploads/shop/b/", "--policy", "strict")
    _, progress = sluice("create", "ci", "--role", "moderate", "--tenant", "shop", *scope)
    assert "uploads only" not in progress
    _, progress = sluice("create", "ada", "--role", "admin", "--all-tenants")
    assert "uploads only" not in progress
    _, progress = sluice("create", "bob", "--role", "moderate")
    assert "the tenant default has no prefix" in progress
    first, second, third = sluice("list")[0].splitlines()
    assert first.endswith("moderate, tenant shop, only s3://uploads/shop/a/ s3://uploads/shop/b/, policies strict")
    assert second.endswith("admin, tenant default, all tenants")
    assert third.endswith("moderate, tenant default")
    listed = [json.loads(line) for line in sluice("list", "--json")[0].splitlines()]
    assert listed[0]["prefixes"] == ["s3://uploads/shop/a/", "s3://uploads/shop/b/"]
    assert [(each["policies"], each["all_tenants"]) for each in listed] == [
        (["strict"], False),
        (None, True),
        (None, False),
    ]
    for wrong, message in (
        (("--prefix", "uploads/shop/"), "prefixes is invalid: 'uploads/shop/' is not a prefix; write s3://"),
        (("--prefix", "s3://uploads/shop"), "must end with a slash; write 's3://uploads/shop/'"),
        (("--prefix", "s3://uploads/a\x1b/"), "has the control character"),
        (("--policy", "strict@1"), "policies is invalid"),
        (("--policy", "tenants"), "policies is invalid"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            sluice("create", "x", "--role", "admin", *wrong)
    assert len(sluice("list")[0].splitlines()) == 3


@pytest.mark.parametrize("field", ["name", "tenant"])
def test_key_with_control_characters_is_refused_or_escaped(
    idle: GatewayBench, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", idle.settings.policy_bucket)
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", idle.settings.s3_endpoint or "")
    forged = "ci\n0123456789abcdef 2026-01-01 ada admin\x1b[1A\x9b2J"
    texts = {"name": "ci", "tenant": "shop"} | {field: forged}
    registry = ApiKeyRegistry.from_settings(idle.settings)
    with pytest.raises(ConfigurationError, match=f"the key's {field} is invalid: it has the control character U"):
        registry.create(texts["name"], "moderate", tenant=texts["tenant"])
    with monkeypatch.context() as patched:  # as earlier releases did
        patched.setattr(api_keys, "require_one_line", str)
        made, _ = registry.create(texts["name"], "moderate", tenant=texts["tenant"])
    assert registry.get(made.id) == made, "the key stays valid"
    printed = CliRunner().invoke(keys.app, ["list"], catch_exceptions=False).stdout.removesuffix("\n").split("\n")
    assert len(printed) == len(registry.read_index())
    assert all(line.isprintable() for line in printed)
