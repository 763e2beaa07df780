"""`sluice policy` against a real S3 server and Valkey. No service runs."""

import asyncio
import json
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from services.policies.document import STORED, PolicyDocument
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import StoredVersion
from tests.support.command_line import run_sluice

Sluice = Callable[..., subprocess.CompletedProcess[str]]

STRICT = """\
name: shop
description: sells things
categories:
  O9: waive
thresholds:
  block: 0.9
"""


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    name = f"policies-{uuid.uuid4()}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=name)
    return name


@pytest.fixture
def sluice(bucket: str, s3_endpoint: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sluice:
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", bucket)
    monkeypatch.setenv("SLUICE_S3_ENDPOINT", s3_endpoint)
    monkeypatch.setenv("SLUICE_REDIS_URL", valkey_url)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.yaml").write_text(STRICT)
    return lambda *arguments: run_sluice("policy", *arguments)


def lines(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_policy_from_publish_to_rollback_is_in_its_history(
    sluice: Sluice, tmp_path: Path, valkey_url: str, bucket: str
) -> None:
    first = lines(sluice("publish", "shop.yaml", "--json"))[0]
    assert first.keys() == {"name", "version", "digest"}
    assert (first["name"], first["version"]) == ("shop", 1)
    shown = sluice("show", "shop@1").stdout
    (tmp_path / "again.yaml").write_text(shown)
    assert lines(sluice("publish", "again.yaml", "--json")) == [first | {"version": 2}], "same content, same digest"
    (tmp_path / "again.yaml").write_text(shown.replace("block: 0.9", "block: 0.7"))
    third = lines(sluice("publish", "again.yaml", "--json"))[0]
    assert third["version"] == 3
    assert third["digest"] != first["digest"]

    refused = sluice("show", "shop")
    assert refused.returncode == 1
    assert "no active version" in refused.stderr
    lines(sluice("activate", "shop@1", "--json"))
    lines(sluice("activate", "shop@3", "--why", "too lenient", "--who", "ann", "--json"))
    canary = lines(sluice("canary", "shop@2", "--percent", "5", "--tenant", "acme", "--json"))[0]
    assert (canary["action"], canary["percent"], canary["tenants"]) == ("canary", 5, ["acme"])
    lines(sluice("shadow", "shop@1", "--percent", "10", "--json"))
    listed = lines(sluice("list", "--json"))[0]
    assert (listed["active"], listed["canary"]["version"], listed["shadow"]["version"]) == (3, 2, 1)
    lines(sluice("rollback", "shop", "--json"))
    history = lines(sluice("history", "shop", "--json"))
    assert [(c["action"], c["from"], c["to"]) for c in history] == [
        ("activate", None, 1),
        ("activate", 1, 3),
        ("canary", None, 2),
        ("shadow", None, 1),
        ("rollback", 3, 1),
    ]
    assert (history[1]["who"], history[1]["why"]) == ("ann", "too lenient")
    assert all(c["at"] for c in history)
    assert sluice("show", "shop").stdout == shown
    changed = sluice("diff", "shop@1", "shop@3").stdout
    assert "-  block: 0.9" in changed
    assert "+  block: 0.7" in changed
    assert "prompt" not in changed, "thresholds are not in the prompt"

    async def told() -> int:
        shared = PolicyRedisCache(valkey_url, bucket)
        known = await shared.find_newest_change("shop")
        await shared.close()
        assert known is not None
        assert known.change is not None
        return known.change.number

    assert asyncio.run(told()) == 5, "Redis was told, and so every process"


def test_invalid_arguments_and_documents_fail_with_one_sentence(
    sluice: Sluice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text("name: shop\nthresholds:\n  review: 0.9\n  block: 0.5\n")
    (tmp_path / "huge.yaml").write_text("name: shop\n" + "# padding\n" * 1_100_000)
    (tmp_path / "bomb.yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    (tmp_path / "escape.yaml").write_text("name: ../../secrets\n")
    lines(sluice("publish", "shop.yaml", "--json"))
    for arguments, sentence in {
        ("check", "bad.yaml"): "bad.yaml:4",
        ("check", "huge.yaml"): "256 KiB",
        ("publish", "bomb.yaml"): "bomb.yaml:1",
        ("publish", "escape.yaml"): "escape.yaml:1",
        ("check", "absent.yaml"): "absent.yaml cannot be read",
        ("activate", "shop"): "names no version",
        ("activate", "shop@9"): "shop@9 does not exist",
        ("activate", "../x@1"): "not a policy name",
        ("rollback", "shop"): "no earlier active version",
        ("rollback", "absent"): "no earlier active version",
        ("canary", "shop@1"): "--percent",
        ("history", "absent"): "no policy",
        ("show", "shop@1@2"): "neither NAME nor NAME@V",
    }.items():
        run = sluice(*arguments)
        assert run.returncode == 1, arguments
        assert sentence in run.stderr, (arguments, run.stderr)
        assert "Traceback" not in run.stderr
        assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert lines(sluice("list", "--json"))[0]["versions"] == 1, "nothing was half published"
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", "absent-bucket")
    assert "absent-bucket" in sluice("publish", "shop.yaml").stderr


def test_activation_without_redis_succeeds_and_warns(sluice: Sluice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", "redis://127.0.0.1:9/0")
    lines(sluice("publish", "shop.yaml", "--json"))
    run = sluice("activate", "shop@1", "--json")
    assert lines(run)[0]["to"] == 1
    assert "running processes apply it within 5 s" in run.stderr


def test_document_with_warnings_is_published(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "lax.yaml").write_text("name: lax\ncategories: {O1: waive, O2: waive, O5: waive, O9: waive}\n")
    run = sluice("check", "lax.yaml")
    assert run.returncode == 0
    assert "warning" in run.stderr
    assert lines(sluice("publish", "lax.yaml", "--json"))[0]["version"] == 1


FORGED = "stricter\n2026-01-01 00:00:00Z activate from shop@1 to shop@2 by alice\x1b[1A\x1b[2K\x9b2J\u202e"


def test_history_and_diff_show_forged_text_on_its_own_line(sluice: Sluice, bucket: str, s3_endpoint: str) -> None:
    """Releases before this one accepted control characters, so stored objects can contain them."""
    objects = boto3.client("s3", endpoint_url=s3_endpoint)
    for _ in range(2):
        assert sluice("publish", "shop.yaml").returncode == 0
    assert sluice("activate", "shop@2", "--why", "stricter").returncode == 0
    (change,) = objects.list_objects_v2(Bucket=bucket, Prefix="policies/shop/changes/")["Contents"]
    stored = json.loads(objects.get_object(Bucket=bucket, Key=change["Key"])["Body"].read())
    objects.put_object(Bucket=bucket, Key=change["Key"], Body=json.dumps(stored | {"why": FORGED}).encode())
    (line,) = sluice("history", "shop").stdout.splitlines()
    assert line.isprintable()
    (printed,) = sluice("history", "shop", "--json").stdout.splitlines()
    assert json.loads(printed)["why"] == FORGED

    rule = "Show fires.\x1b[1A\x1b[2K\u202e"
    document = PolicyDocument.model_validate({"name": "shop", "categories": {"O1": {"can": [rule]}}}, context=STORED)
    versions = objects.list_objects_v2(Bucket=bucket, Prefix="policies/shop/versions/")["Contents"]
    newest = min(each["Key"] for each in versions)
    body = StoredVersion("shop", 2, document.digest(), document).to_json()
    objects.put_object(Bucket=bucket, Key=newest, Body=body)
    compared = sluice("diff", "shop@1", "shop@2")
    assert compared.returncode == 0, compared.stderr
    assert "Show fires.\ufffd[1A" in compared.stdout
    assert all(each.isprintable() for each in compared.stdout.split("\n"))
    shown = sluice("show", "shop@2").stdout
    assert all(each.isprintable() for each in shown.split("\n"))
    assert yaml.safe_load(shown)["categories"]["O1"]["can"] == [rule], "a stored version stays readable"


def test_rule_or_reason_with_control_characters_is_refused(sluice: Sluice, tmp_path: Path) -> None:
    hostile = 'name: shop\ncategories: {O1: {can: ["Show fires.\\e[1A\\e[2K"]}}\n'
    (tmp_path / "hostile.yaml").write_text(hostile)
    for command in ("check", "publish"):
        refused = sluice(command, "hostile.yaml")
        assert refused.returncode == 1
        assert "U+001B" in refused.stderr
    assert sluice("publish", "shop.yaml").returncode == 0
    refused = sluice("activate", "shop@1", "--why", FORGED)
    assert refused.returncode == 1
    assert "the reason has the control character U+000A" in refused.stderr
    assert sluice("activate", "shop@1", "--who", FORGED).returncode == 0
    (line,) = sluice("history", "shop").stdout.splitlines()
    assert line.isprintable()
    assert run_sluice("calibrate", "data.jsonl", "--why", FORGED).stderr.startswith("sluice: --why has the control")
