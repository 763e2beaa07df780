"""What a request says about its image, made into what moderation takes: a submission, and bytes that came with it."""

import asyncio
import base64
import binascii
from dataclasses import dataclass
from typing import Final

from services.core.errors import Malformed
from services.core.messages import ImageRequest, Submission, Upload
from services.core.values import StoredObject
from services.gateway.api_keys import ApiKey
from services.gateway.problems import HttpProblem
from services.gateway.request_bodies import MemoryLease
from services.gateway.url_fetch import ImageDownloader

_LONGEST_URL: Final = 2048
_LONGEST_MEDIA_TYPE: Final = 200
_LARGE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """One image to be judged."""

    request: ImageRequest
    upload: StoredObject | None = None
    """Its bytes, where it came with the request or from a URL."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the client wants besides: who it is, its own id, and the policy."""

    key: ApiKey
    submission_id: str
    policy: str = "default"


async def from_upload(data: bytes, context: RequestContext) -> Image:
    """An image whose bytes came with the request.

    Raises:
        HttpProblem: a field cannot be one of a submission.
    """
    # The URI has the digest of the bytes. Hashing megabytes on the event loop would delay all other requests.
    uri = Upload.uri_of(data) if len(data) < _LARGE_BYTES else await asyncio.to_thread(Upload.uri_of, data)
    return Image(_request(Upload, context, uri=uri), StoredObject(data, version_id=None, etag=None))


def from_s3(uri: str, context: RequestContext, *, version_id: str | None = None, etag: str | None = None) -> Image:
    """An object in S3.

    Raises:
        HttpProblem: a field cannot be one of a submission.
    """
    return Image(_request(Submission, context, uri=uri, version_id=version_id, etag=etag))


async def from_url(url: str, context: RequestContext, *, downloader: ImageDownloader, lease: MemoryLease) -> Image:
    """The image at a `data:`, `s3:` or `http(s):` URL.

    Raises:
        HttpProblem: it is none of them, or cannot be had.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        lease.reserve(len(url) * 3 // 4)
        data = data_of(url) if len(url) < _LARGE_BYTES else await asyncio.to_thread(data_of, url)
        return await from_upload(data, context)
    if len(url) > _LONGEST_URL:
        raise HttpProblem("invalid", f"a URL has {_LONGEST_URL} characters at most, unless it is a data: URL")
    if scheme == "s3":
        return from_s3(url, context)
    if scheme in {"http", "https"}:
        return await from_upload(await downloader.fetch(url, lease), context)
    raise HttpProblem("invalid", "the URL has to begin with data:, s3:// or https://")


def data_of(url: str) -> bytes:
    """The bytes of a base64 `data:` URL. The media type that it names is not believed, and not looked at.

    Raises:
        HttpProblem: it is not a data: URL of an image in base64.
    """
    header, comma, content = url[5:].partition(",") if "," in url[: 5 + _LONGEST_MEDIA_TYPE] else ("", "", "")
    media_type, *parameters = header.lower().split(";")
    if not comma or not media_type.startswith("image/") or "base64" not in parameters:
        raise HttpProblem("invalid", "a data: URL has to begin with data:image/<type>;base64,")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise HttpProblem("invalid", "the data: URL is not base64") from None


def _request(model: type[ImageRequest], context: RequestContext, **fields: str | None) -> ImageRequest:
    try:
        return model.parse(
            {"id": context.submission_id, "tenant": context.key.tenant, "policy": context.policy, **fields}
        )
    except Malformed as error:
        field, _, why = str(error).partition(": ")
        raise HttpProblem("invalid", str(error), param=field if why else None) from None
