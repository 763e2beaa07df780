"""Images of requests: `data:` URLs, the memory that they take, and URLs that are refused."""

import base64

import pytest

from services.core.messages import Upload
from services.gateway.api_keys import ApiKey
from services.gateway.body_memory import BodyMemory
from services.gateway.problems import HttpProblem
from services.gateway.submitted_images import RequestContext, decode_data_url, from_s3, from_upload, from_url
from services.gateway.url_fetch import ImageDownloader

KEY = ApiKey(id="0" * 16, name="n", role="moderate", tenant="shop", digest="", created_at="2026-01-01T00:00:00Z")
CONTEXT = RequestContext(KEY, "upl-1", "strict")
DOWNLOADER = ImageDownloader([], limit_bytes=1, deadline_s=1)
LARGE = b"x" * (1 << 20)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("header", ["image/png;base64", "IMAGE/x-unknown;charset=a;BASE64"])
def test_data_url_of_any_image_type_is_decoded(header: str) -> None:
    assert decode_data_url(f"data:{header},YWJj") == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,abc",
        "data:image/png,abc",
        "data:text/html;base64,YWJj",
        "data:image/png;base64,YW Jj",
        "data:image/png;base64,YWJ",
        f"data:image/png;{'a' * 300};base64,YWJj",
    ],
)
def test_invalid_data_url_is_refused(url: str) -> None:
    with pytest.raises(HttpProblem) as refused:
        decode_data_url(url)
    assert refused.value.kind == "invalid"


@pytest.mark.parametrize("data", [b"abc", LARGE], ids=["small", "large"])
async def test_image_of_a_data_url_is_an_upload_and_holds_memory(data: bytes) -> None:
    memory = BodyMemory(16 << 20)
    with memory.lease("a") as lease:
        image = await from_url(data_url(data), CONTEXT, downloader=DOWNLOADER, lease=lease)
        assert memory.used_bytes >= len(data)
    assert image.upload is not None
    assert image.upload.data == data
    assert image.request.uri == Upload.make_uri(data)
    assert (image.request.id, image.request.tenant, image.request.policy) == ("upl-1", "shop", "strict")


async def test_data_url_over_the_memory_limit_is_refused_before_it_is_decoded() -> None:
    memory = BodyMemory(len(LARGE))
    with memory.lease("a") as lease, pytest.raises(HttpProblem) as refused:
        await from_url(data_url(LARGE), CONTEXT, downloader=DOWNLOADER, lease=lease)
    assert refused.value.kind == "too-many-at-once"


@pytest.mark.parametrize("url", ["", "ftp://host/a", "s3://uploads", f"s3://uploads/{'a' * 3000}", "upload:sha256:0"])
async def test_url_with_another_scheme_or_too_many_characters_is_invalid(url: str) -> None:
    with BodyMemory(1000).lease("a") as lease, pytest.raises(HttpProblem) as refused:
        await from_url(url, CONTEXT, downloader=DOWNLOADER, lease=lease)
    assert refused.value.kind == "invalid"


async def test_invalid_field_of_a_submission_is_named() -> None:
    context = RequestContext(KEY, "x" * 257)
    with pytest.raises(HttpProblem) as of_reference:
        from_s3("s3://uploads/a", context)
    with pytest.raises(HttpProblem) as of_upload:
        await from_upload(b"abc", context)
    for refused in (of_reference, of_upload):
        assert (refused.value.kind, refused.value.param) == ("invalid", "id")
