"""Files that a command puts into a bucket which the service reads."""

import uuid
from pathlib import Path
from typing import BinaryIO, Final

from botocore.exceptions import BotoCoreError, ClientError

from services.core.errors import ConfigurationError, StoreUnavailable
from services.core.messages import ObjectReference
from services.core.s3 import s3_client
from services.core.settings import Settings

_FOLDER: Final = "submitted"


class Uploads:
    """Uploads to the first bucket of SLUICE_S3_BUCKETS."""

    def __init__(self, settings: Settings, folder: str = _FOLDER) -> None:
        """`folder`: what the keys begin with.

        Raises:
            ConfigurationError: no bucket is set.
        """
        if not settings.s3_buckets:
            raise ConfigurationError("SLUICE_S3_BUCKETS is not set; files are uploaded to the first bucket it names")
        self._bucket = settings.s3_buckets[0]
        self._folder = folder
        self._s3 = s3_client(settings, retries={"mode": "standard"})

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
                return self.put(file.name, body)
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error

    def put(self, name: str, body: bytes | BinaryIO) -> ObjectReference:
        """Upload bytes or an open file, under a key of their own that ends in `name`; raises StoreUnavailable."""
        key = f"{self._folder}/{uuid.uuid4()}/{name}"
        try:
            answer = self._s3.put_object(Bucket=self._bucket, Key=key, Body=body)
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"{name} cannot be uploaded to the bucket {self._bucket}: {error}") from error
        return ObjectReference(
            bucket=self._bucket, key=key, version_id=answer.get("VersionId"), etag=answer.get("ETag")
        )

    def remove(self, uploaded: ObjectReference) -> None:
        """Delete what was uploaded, in a bucket with versions that version; raises StoreUnavailable."""
        pins = {"VersionId": uploaded.version_id} if uploaded.version_id else {}
        try:
            self._s3.delete_object(Bucket=uploaded.bucket, Key=uploaded.key, **pins)  # type: ignore[arg-type]
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"{uploaded.uri} cannot be removed again: {error}") from error
