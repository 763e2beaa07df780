"""One S3 server for the folder, a bucket for each test."""

import uuid

import boto3
import pytest

from services.policies.registry import PolicyRegistry


@pytest.fixture
def registry(s3_endpoint: str) -> PolicyRegistry:
    """A registry on an empty policy bucket."""
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    bucket = f"policies-{uuid.uuid4()}"
    s3.create_bucket(Bucket=bucket)
    return PolicyRegistry(s3, bucket)
