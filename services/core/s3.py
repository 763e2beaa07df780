"""The clients of S3: AWS, or the server that SLUICE_S3_ENDPOINT names."""

from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from services.core.errors import ConfigurationError
from services.core.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def s3_client(settings: Settings, **config: Any) -> "S3Client":
    """A client with credentials the usual AWS way; `config` goes to botocore's `Config`.

    Raises:
        ConfigurationError: what AWS's variables and files say cannot be used.
    """
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=settings.s3_endpoint,
            config=Config(
                s3={"addressing_style": "path" if settings.s3_endpoint else "auto"},
                # S3 servers other than AWS refuse the rest.
                request_checksum_calculation="when_required" if settings.s3_endpoint else "when_supported",
                response_checksum_validation="when_required",
                **config,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"S3 cannot be used: {error}; correct SLUICE_S3_ENDPOINT or AWS's settings") from None
