"""What a request says about its image, made into what moderation takes: a submission, and bytes that came with it."""

import asyncio
import base64
import binascii
from dataclasses import dataclass
from typing import Final

from services.core.errors import Malformed
from services.core.messages import StoredObject, Submission, Upload
from services.gateway.api_keys import ApiKey
from services.gateway.problems import Problem
from services.gateway.request_bodies import Account
from services.gateway.url_fetch import RemoteImages

_LONGEST_URL: Final = 2048
_LONGEST_MEDIA_TYPE: Final = 200
_LARGE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """One image to be judged."""

    submission: Submission
    upload: StoredObject | None = None
    """Its bytes, where it came with the request or from a URL."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the client wants besides: who it is, its own id, and the policy."""

    key: ApiKey
    submission_id: str
    policy: str = "default"


async def uploaded(data: bytes, wish: Wish) -> Image:
    """An image whose bytes came with the request.

    Raises:
        Problem: a field cannot be one of a submission.
    """
    if len(data) < _LARGE:
        return _uploaded(data, wish)
    return await asyncio.to_thread(_uploaded, data, wish)  # hashing megabytes would keep everyone else waiting


def referred(uri: str, wish: Wish, *, version_id: str | None = None, etag: str | None = None) -> Image:
    """An object in S3.

    Raises:
        Problem: a field cannot be one of a submission.
    """
    return Image(_submission(Submission, wish, uri=uri, version_id=version_id, etag=etag))


async def at_url(url: str, wish: Wish, *, remote: RemoteImages, account: Account) -> Image:
    """The image at a `data:`, `s3:` or `http(s):` URL.

    Raises:
        Problem: it is none of them, or cannot be had.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        account.take(len(url) * 3 // 4)
        return await uploaded(data_of(url) if len(url) < _LARGE else await asyncio.to_thread(data_of, url), wish)
    if len(url) > _LONGEST_URL:
        raise Problem("invalid", f"a URL has {_LONGEST_URL} characters at most, unless it is a data: URL")
    if scheme == "s3":
        return referred(url, wish)
    if scheme in {"http", "https"}:
        return await uploaded(await remote.fetch(url, account), wish)
    raise Problem("invalid", "the URL has to begin with data:, s3:// or https://")


def data_of(url: str) -> bytes:
    """The bytes of a base64 `data:` URL. The media type that it names is not believed, and not looked at.

    Raises:
        Problem: it is not a data: URL of an image in base64.
    """
    header, comma, content = url[5:].partition(",") if "," in url[: 5 + _LONGEST_MEDIA_TYPE] else ("", "", "")
    media_type, *parameters = header.lower().split(";")
    if not comma or not media_type.startswith("image/") or "base64" not in parameters:
        raise Problem("invalid", "a data: URL has to begin with data:image/<type>;base64,")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Problem("invalid", "the data: URL is not base64") from None


def _uploaded(data: bytes, wish: Wish) -> Image:
    upload = _submission(Upload, wish, uri=Upload.uri_of(data))
    return Image(upload, StoredObject(data, version_id=None, etag=None))


def _submission(model: type[Submission], wish: Wish, **fields: str | None) -> Submission:
    try:
        return model.parse({"id": wish.submission_id, "tenant": wish.key.tenant, "policy": wish.policy, **fields})
    except Malformed as error:
        field, _, why = str(error).partition(": ")
        raise Problem("invalid", str(error), param=field if why else None) from None
