"""Files of `sluice submit` are uploaded where the tenant's submissions may read them."""

from pathlib import Path
from typing import Any

import boto3
import pytest

from pipelines.clients.streams import read_references
from services.core.errors import ConfigurationError
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.tenancy import Tenancy
from tests.support.intake_bench import empty_bucket

PREFIXES = ("shop=s3://forum-uploads/shop/", "shop=s3://uploads/", "forum=s3://forum-uploads")


def submit(settings: Settings, file: Path, tenant: str) -> Submission:
    (submission,) = read_references([str(file)], settings, policy="default", tenant=tenant, lines=[])
    return submission


@pytest.mark.parametrize(
    ("prefixes", "tenant", "begins_with"),
    [
        ((), "default", "s3://uploads/submitted/"),
        ((), "shop", "s3://uploads/submitted/"),
        (PREFIXES, "shop", "s3://forum-uploads/shop/submitted/"),
        (PREFIXES, "forum", "s3://forum-uploads/submitted/"),
    ],
)
def test_file_is_uploaded_below_a_prefix_of_its_tenant(
    s3_endpoint: str, tmp_path: Path, prefixes: tuple[str, ...], tenant: str, begins_with: str
) -> None:
    s3: Any = boto3.client("s3", endpoint_url=s3_endpoint)
    for bucket in ("uploads", "forum-uploads"):
        empty_bucket(s3, bucket)
    (tmp_path / "cat.jpg").write_bytes(b"a picture")
    settings = Settings(s3_endpoint=s3_endpoint, s3_buckets=("uploads", "forum-uploads"), tenant_prefixes=prefixes)
    submission = submit(settings, tmp_path / "cat.jpg", tenant)
    assert submission.uri.startswith(begins_with)
    stored = submission.reference
    assert s3.get_object(Bucket=stored.bucket, Key=stored.key)["Body"].read() == b"a picture"
    assert Tenancy(prefixes).find_scope(tenant).allows_object(stored.bucket, stored.key)


def test_file_of_a_tenant_without_a_prefix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a picture")
    settings = Settings(s3_buckets=("uploads", "forum-uploads"), tenant_prefixes=PREFIXES)
    with pytest.raises(ConfigurationError, match="the tenant 'default' has no prefix in SLUICE_TENANT_PREFIXES"):
        submit(settings, tmp_path / "cat.jpg", "default")
