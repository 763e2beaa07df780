"""Create the buckets that the settings name, unless they exist."""

from contextlib import suppress

import boto3

from services.core.settings import load

settings = load("s3_buckets", "policy_bucket")
s3 = boto3.client("s3", endpoint_url=settings.s3_endpoint)
for bucket in (*settings.s3_buckets, settings.policy_bucket):
    with suppress(s3.exceptions.BucketAlreadyOwnedByYou):
        s3.create_bucket(Bucket=bucket)
