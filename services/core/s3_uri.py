"""Addresses in S3, `s3://bucket/key`. Kept apart from s3.py, because boto3 takes a third of a second to load."""


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into the bucket and the key. The key is empty if the URI names a bucket only.

    Raises:
        ValueError: the scheme is not s3, or the bucket is missing.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise ValueError("must be s3://bucket/key")
    return bucket, key
