"""The submissions of an outside client, and the outcome that the documentation promises for each."""

import io
import json
import struct
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import pillow_heif
from PIL import Image

from pipelines.tiny_guard.drawings import draw

pillow_heif.register_heif_opener()

UPLOADS = "uploads"


@dataclass(frozen=True)
class Case:
    """One message, and its outcome."""

    submission_id: str | None
    value: bytes
    end: str
    """`verdict`, a dead-letter reason, or `nothing`."""
    key: bytes | None = None
    headers: dict[str, bytes] = field(default_factory=dict)
    rating: str | None = None
    """The rating of the drawing, if the outcome is a verdict."""


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _sideways(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _save(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=exif)


ENCODERS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: _save(image, "JPEG", quality=85),
    "jpeg-progressive": lambda image: _save(image, "JPEG", quality=85, progressive=True),
    "jpeg-sideways": _sideways,
    "jpeg-cmyk": lambda image: _save(image.convert("CMYK"), "JPEG", quality=90),
    "png": lambda image: _save(image, "PNG"),
    "png-palette": lambda image: _save(image.quantize(64), "PNG"),
    "png-alpha": lambda image: _save(image.convert("RGBA"), "PNG"),
    "webp": lambda image: _save(image, "WEBP", quality=85),
    "gif": lambda image: _save(image, "GIF"),
    "bmp": lambda image: _save(image, "BMP"),
    "tiff": lambda image: _save(image, "TIFF", compression="tiff_lzw"),
    "avif": lambda image: _save(image, "AVIF", quality=80),
    "heic": lambda image: _save(image, "HEIF", quality=80),
}


def images(count: int, put: Callable[[str, bytes], str]) -> Iterator[Case]:
    """Submissions of `count` drawn images in every format, with wrong extensions and content types.

    `put` uploads an object and returns its ETag.
    """
    for number, kind in zip(range(count), cycle(ENCODERS), strict=False):
        sample = draw(50_000 + number)
        key = f"bild {number:03d}ä.{'txt' if number % 3 else 'jpg'}"
        etag = put(key, ENCODERS[kind](sample.image))
        document: dict[str, Any] = {"id": f"{kind}-{number}", "uri": f"s3://{UPLOADS}/{key}", "metadata": {"n": number}}
        if number % 2:
            document |= {"etag": etag, "policy": "default@1", "tenant": "shop", "unknown": [1, 2]}
        yield Case(document["id"], json.dumps(document).encode(), "verdict", rating=sample.rating)


def events(put: Callable[[str, bytes], str]) -> Iterator[Case]:
    """S3 notifications and CloudEvents."""
    picture = _save(draw(1).image, "JPEG")
    keys = [f"events/ä +{number}.jpg" for number in range(5)]
    etags = [put(key, picture) for key in keys]

    def record(number: int, name: str = "ObjectCreated:Put") -> dict[str, Any]:
        return {
            "eventName": name,
            "eventTime": "2026-01-21T10:00:00.000Z",
            "s3": {
                "bucket": {"name": UPLOADS},
                "object": {
                    "key": urllib.parse.quote_plus(keys[number]),
                    "eTag": etags[number],
                    "sequencer": f"0055AED6DCD9028{number}",
                },
            },
        }

    def id_of(number: int) -> str:
        return f"{UPLOADS}/{keys[number]}#0055AED6DCD9028{number}"

    yield Case(id_of(0), json.dumps({"Records": [record(0)]}).encode(), "verdict")
    yield Case(None, json.dumps({"Records": [record(1, "ObjectRemoved:Delete")]}).encode(), "nothing")
    test_event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": UPLOADS}
    yield Case(None, json.dumps(test_event).encode(), "nothing")
    structured = {
        "specversion": "1.0",
        "type": "com.example.upload",
        "source": "/uploads",
        "id": "event-1",
        "datacontenttype": "application/json",
        "data": {"id": "structured-1", "uri": f"s3://{UPLOADS}/{keys[1]}"},
    }
    yield Case("structured-1", json.dumps(structured).encode(), "verdict")
    ce = {"ce_specversion": b"1.0", "ce_type": b"com.example.upload", "ce_source": b"/uploads", "ce_id": b"event-2"}
    native = json.dumps({"id": "binary-1", "uri": f"s3://{UPLOADS}/{keys[2]}"}).encode()
    yield Case("binary-1", native, "verdict", headers=ce | {"content-type": b"application/json"})
    yield Case(id_of(3), json.dumps({"Records": [record(3)]}).encode(), "verdict", headers=ce, key=b"own key")
    gone = record(4)
    gone["s3"]["object"]["eTag"] = "0" * 32
    yield Case(id_of(4), json.dumps({"Records": [gone]}).encode(), "changed")


def bad_input(put: Callable[[str, bytes], str]) -> Iterator[Case]:
    """Every kind of invalid submission that the documentation lists and a client can cause."""
    picture = _save(draw(2).image, "JPEG")
    uri = f"s3://{UPLOADS}/fine.jpg"
    put("fine.jpg", picture)
    yield Case(None, b"not json", "malformed")
    yield Case(None, b"\xff\xfe\x00", "malformed")
    yield Case(None, b"", "malformed")
    yield Case(None, json.dumps({"uri": uri}).encode(), "malformed")
    yield Case(None, json.dumps({"id": "x" * 257, "uri": uri}).encode(), "malformed")
    yield Case("no-uri", json.dumps({"id": "no-uri"}).encode(), "malformed")
    yield Case("http", json.dumps({"id": "http", "uri": "http://example.com/a.jpg"}).encode(), "malformed")

    def native(name: str, **fields: Any) -> bytes:
        return json.dumps({"id": name, "uri": uri} | fields).encode()

    yield Case("other-bucket", native("other-bucket", uri="s3://secrets/a.jpg"), "forbidden", key=b"k")
    yield Case("no-key", native("no-key", uri=f"s3://{UPLOADS}/absent.jpg"), "not_found")
    yield Case("no-version", native("no-version", version_id="3HL4kqtJvjVBH40Nrjfkd"), "not_found")
    yield Case("changed", native("changed", etag="00000000000000000000000000000000"), "changed")
    yield Case("no-policy", native("no-policy", policy="absent"), "unknown_policy")
    yield Case("no-policy-version", native("no-policy-version", policy="default@99"), "unknown_policy")
    for name, data, reason in (
        ("empty", b"", "not_an_image"),
        ("text", b"just text", "not_an_image"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not_an_image"),
        ("cut-jpeg", picture[: len(picture) // 2], "not_an_image"),
        ("cut-png", _save(draw(3).image, "PNG")[:-40], "not_an_image"),
        ("unknown", b"\x00\x01\x02\x03" * 100, "not_an_image"),
        ("bomb", _png_bomb(30_000), "too_large"),
        ("heavy", picture + bytes(3 << 20), "too_large"),
    ):
        key = f"bad/{name}.jpg"
        put(key, data)
        yield Case(name, native(name, uri=f"s3://{UPLOADS}/{key}"), reason)


IMAGE_LIMIT_BYTES = 2 << 20
"""The setting of the service. The image `heavy` is larger."""


def _png_bomb(side: int) -> bytes:
    """A black square of side x side pixels, compressed to a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    row = bytes(side // 8 + 2)
    data = b"".join([*(rows.compress(row) for _ in range(side)), rows.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
