"""Uploads the files of `sluice submit` to a bucket that the service reads."""

import uuid
from pathlib import Path
from typing import BinaryIO, Final

from services.core.errors import ConfigurationError, StoreUnavailable, Unjudgeable
from services.core.messages import ObjectReference
from services.core.s3 import Bucket, s3_client
from services.core.settings import Settings
from services.core.tenancy import DEFAULT_TENANT, Tenancy, parse_prefix

_FOLDER: Final = "submitted"


class Uploads:
    """Uploads to the first bucket of SLUICE_S3_BUCKETS, or below the tenant's first prefix if tenants are separated."""

    def __init__(self, settings: Settings, tenant: str = DEFAULT_TENANT) -> None:
        """
        Raises:
            ConfigurationError: no bucket is set, or the tenant has no prefix.
        """
        if not settings.s3_buckets:
            raise ConfigurationError("SLUICE_S3_BUCKETS is not set; files are uploaded to the first bucket it names")
        bucket, self._folder = settings.s3_buckets[0], ""
        tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
        if tenancy.is_separated:
            if not (prefixes := tenancy.list_prefixes(tenant)):
                raise ConfigurationError(
                    f"the tenant {tenant!r} has no prefix in SLUICE_TENANT_PREFIXES, so its files could not be judged; "
                    "name another tenant with --tenant, or give it a prefix"
                )
            bucket, self._folder = parse_prefix(prefixes[0])
        self._bucket = Bucket(s3_client(settings.s3_endpoint, retries={"mode": "standard"}), bucket)

    def put_file(self, file: Path) -> ObjectReference:
        """Upload one file, under a key of its own.

        Raises:
            ConfigurationError: the file cannot be read.
            StoreUnavailable: it cannot be uploaded.
        """
        if not file.is_file():
            raise ConfigurationError(f"{file} is neither a file nor an s3:// URI")
        try:
            with file.open("rb") as body:
                return self._put(file.name, body)
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error

    def _put(self, name: str, body: BinaryIO) -> ObjectReference:
        """Upload an open file under a key of its own that ends in `name`; raises StoreUnavailable."""
        key = f"{self._folder}{_FOLDER}/{uuid.uuid4()}/{name}"
        try:
            version_id, etag = self._bucket.put(key, body)
        except (Unjudgeable, StoreUnavailable) as error:
            raise StoreUnavailable(f"{name} cannot be uploaded to the bucket {self._bucket.name}: {error}") from error
        return ObjectReference(bucket=self._bucket.name, key=key, version_id=version_id, etag=etag)
