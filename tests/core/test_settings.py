"""Settings are read from the environment; an error names every variable that is missing or wrong."""

import os

import pytest

from services.core.errors import ConfigurationError
from services.core.settings import Settings, load, require

NEEDED = {
    "SLUICE_STREAM_URL": "kafka://a:9092,b:9092",
    "SLUICE_REDIS_URL": "redis://host:6379/0",
    "SLUICE_S3_BUCKETS": "uploads, more ,",
    "SLUICE_POLICY_BUCKET": "policies",
    "SLUICE_MODEL": "tiny",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(name)
    for name, value in NEEDED.items():
        monkeypatch.setenv(name, value)


def test_load_needed_settings_present_are_read() -> None:
    settings = load()
    assert (settings.s3_buckets, settings.policy_bucket) == (("uploads", "more"), "policies")


def test_load_settings_missing_error_names_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_MODEL")
    monkeypatch.setenv("SLUICE_REDIS_URL", "")
    with pytest.raises(ConfigurationError, match=r"^SLUICE_REDIS_URL, SLUICE_MODEL not set; set them"):
        load()


def test_require_other_fields_checks_only_these() -> None:
    require(Settings(), "policy_bucket")
    with pytest.raises(ConfigurationError, match=r"^SLUICE_RAY_ADDRESS not set; set it"):
        require(Settings(), "policy_bucket", "ray_address")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLUICE_STREAM_URL", "http://host", "SLUICE_STREAM_URL is wrong: must begin with kafka:// or redis://"),
        ("SLUICE_REDIS_URL", "redis://:a/b@host", "SLUICE_REDIS_URL is wrong: has an invalid port"),
        ("SLUICE_S3_ENDPOINT", "host:9000", "SLUICE_S3_ENDPOINT is wrong: must begin with http:// or https://"),
        ("SLUICE_KAFKA_OPTIONS", "{", "SLUICE_KAFKA_OPTIONS is wrong: it is not a JSON object"),
        ("SLUICE_IN_FLIGHT", "0", "SLUICE_IN_FLIGHT is wrong: "),
        ("SLUICE_TENANT_PREFIXES", "shop", "SLUICE_TENANT_PREFIXES is wrong: 'shop' is not tenant=value; write for ex"),
        ("SLUICE_TENANT_PREFIXES", "a=uploads/a/", "SLUICE_TENANT_PREFIXES is wrong: 'uploads/a/' is not a prefix; "),
        ("SLUICE_TENANT_PREFIXES", "a=s3://uploads/a", "SLUICE_TENANT_PREFIXES is wrong: 's3://uploads/a' must end"),
        ("SLUICE_TENANT_PREFIXES", "a=s3://uploads/../b/", "SLUICE_TENANT_PREFIXES is wrong: 's3://uploads/../b/' ca"),
        (
            "SLUICE_TENANT_PREFIXES",
            "a=s3://other/",
            "SLUICE_TENANT_PREFIXES is wrong: 'a=s3://other/' is in the bucket",
        ),
        ("SLUICE_TENANT_POLICIES", "a=strict", "SLUICE_TENANT_POLICIES is wrong: it has no effect without SLUICE_TENA"),
        ("SLUICE_TENANT_POLICIES", "a=strict@1", "SLUICE_TENANT_POLICIES is wrong: 'a=strict@1' names a version; "),
    ],
)
def test_load_invalid_value_error_names_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert str(caught.value).startswith(message)


def test_load_several_invalid_values_error_names_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_IN_FLIGHT", "none")
    monkeypatch.setenv("SLUICE_DRAIN_S", "-1")
    with pytest.raises(ConfigurationError, match=r"SLUICE_IN_FLIGHT is wrong: .*; SLUICE_DRAIN_S is wrong: "):
        load()


@pytest.mark.parametrize(("value", "stream"), [(None, "sluice.submissions.backfill"), ("", ""), ("own", "own")])
def test_load_backfill_stream_may_be_empty(monkeypatch: pytest.MonkeyPatch, value: str | None, stream: str) -> None:
    if value is not None:
        monkeypatch.setenv("SLUICE_BACKFILL_STREAM", value)
    assert load().backfill_stream == stream


def test_model_revisions_are_whole_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch or a short digest could later mean other files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("SLUICE_MODEL_REVISIONS", f"a/b@{commit}, c/d@{commit}")
    assert load().model_revisions == (f"a/b@{commit}", f"c/d@{commit}")
    for wrong in ("a/b@main", f"a/b@{commit[:7]}", f"b@{commit}", f"a/b@{commit}0", commit):
        monkeypatch.setenv("SLUICE_MODEL_REVISIONS", f"x/y@{commit},{wrong}")
        with pytest.raises(ConfigurationError, match="SLUICE_MODEL_REVISIONS is wrong"):
            load()


def test_redis_signing_key_short_is_refused_and_long_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_REDIS_SIGNING_KEY", "short")
    with pytest.raises(ConfigurationError, match="SLUICE_REDIS_SIGNING_KEY is wrong") as caught:
        load()
    assert "'short'" not in str(caught.value)
    secret = "s3cret" * 8
    monkeypatch.setenv("SLUICE_REDIS_SIGNING_KEY", secret)
    settings = load()
    assert settings.redis_signing_key
    assert settings.redis_signing_key.get_secret_value() == secret
    assert secret not in f"{settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert "redis_signing_key" not in settings.model_dump(mode="json")
