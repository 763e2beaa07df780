"""Images of HTTP requests: uploads, `data:` URLs, http(s) URLs and objects in S3, as the moderator takes them."""

import asyncio
import base64
import binascii
from dataclasses import dataclass
from typing import Final

from services.core.errors import Malformed
from services.core.messages import ImageRequest, Submission, Upload
from services.core.values import StoredObject
from services.gateway.api_keys import ApiKey
from services.gateway.body_memory import MemoryLease
from services.gateway.problems import HttpProblem
from services.gateway.url_fetch import ImageDownloader

_URL_LIMIT_CHARS: Final = 2048
_MEDIA_TYPE_LIMIT_CHARS: Final = 200
_LARGE_UPLOAD_BYTES: Final = 1 << 20
"""Larger uploads are decoded and hashed in a thread, because they would delay other requests on the event loop."""


@dataclass(frozen=True, slots=True)
class SubmittedImage:
    """One image that a client asks to judge."""

    request: ImageRequest
    upload: StoredObject | None = None
    """The bytes, if the image came with the request or from an http(s) URL."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The fields of a submission that do not depend on its image."""

    api_key: ApiKey
    submission_id: str
    policy: str = "default"


async def from_upload(data: bytes, context: RequestContext) -> SubmittedImage:
    """Take an image whose bytes came with the request.

    Raises:
        HttpProblem: a field is invalid.
    """
    uri = Upload.make_uri(data) if len(data) < _LARGE_UPLOAD_BYTES else await asyncio.to_thread(Upload.make_uri, data)
    return SubmittedImage(_build_request(Upload, context, uri=uri), StoredObject(data, version_id=None, etag=None))


def from_s3(
    uri: str, context: RequestContext, *, version_id: str | None = None, etag: str | None = None
) -> SubmittedImage:
    """Refer to an object in S3.

    Raises:
        HttpProblem: a field is invalid.
    """
    return SubmittedImage(_build_request(Submission, context, uri=uri, version_id=version_id, etag=etag))


async def from_url(
    url: str, context: RequestContext, *, downloader: ImageDownloader, lease: MemoryLease
) -> SubmittedImage:
    """Take the image at a `data:`, `s3:` or `http(s):` URL.

    Raises:
        HttpProblem: the URL has another scheme or is invalid, or the image cannot be fetched.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        lease.reserve(len(url) * 3 // 4)
        data = decode_data_url(url) if len(url) < _LARGE_UPLOAD_BYTES else await asyncio.to_thread(decode_data_url, url)
        return await from_upload(data, context)
    if len(url) > _URL_LIMIT_CHARS:
        raise HttpProblem("invalid", f"a URL may have at most {_URL_LIMIT_CHARS} characters, unless it is a data: URL")
    if scheme == "s3":
        return from_s3(url, context)
    if scheme in {"http", "https"}:
        return await from_upload(await downloader.fetch(url, lease), context)
    raise HttpProblem("invalid", "the URL must begin with data:, s3:// or https://")


def decode_data_url(url: str) -> bytes:
    """Decode a base64 `data:` URL. The image type in the URL is ignored, because it may be wrong.

    Raises:
        HttpProblem: the URL is not a `data:` URL of an image in base64.
    """
    header, comma, content = url[5:].partition(",") if "," in url[: 5 + _MEDIA_TYPE_LIMIT_CHARS] else ("", "", "")
    media_type, *parameters = header.lower().split(";")
    if not comma or not media_type.startswith("image/") or "base64" not in parameters:
        raise HttpProblem("invalid", "a data: URL must begin with data:image/<type>;base64,")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise HttpProblem("invalid", "the data: URL is not base64") from None


def _build_request(model: type[ImageRequest], context: RequestContext, **fields: str | None) -> ImageRequest:
    try:
        return model.parse(
            {"id": context.submission_id, "tenant": context.api_key.tenant, "policy": context.policy, **fields}
        )
    except Malformed as error:
        field, _, why = str(error).partition(": ")
        raise HttpProblem("invalid", str(error), param=field if why else None) from None
