"""Where fuzzing starts from, and what it does to it. Seeded: the same seed makes the same cases."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pipelines.tiny_guard.drawings import draw
from tests.support.pictures import FORMATS, encoded, picture, textured

CORPUS: Final = Path(__file__).with_name("corpus")
_INTERESTING: Final = (
    *(b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff\xff\xff"),
    *(b"{", b"}", b"[", b'"', b"\\u0000", b"\\ud800", b"1e999", b"-0", b"null", b"NaN", b"\xed\xa0\x80"),
    *(b"IHDR", b"IDAT", b"\xff\xd8", b"\xff\xda", b"ftyp", b"meta", b"iloc", b"VP8X", b"Exif\x00\x00"),
)
_LONGEST: Final = 1 << 16


def messages() -> list[bytes]:
    """Well-formed messages of every kind, and the finds."""
    record = {
        "eventName": "ObjectCreated:Put",
        "eventTime": "2026-11-21T10:00:00Z",
        "s3": {
            "bucket": {"name": "uploads"},
            "object": {"key": "a+b%C3%A9.jpg", "eTag": "e", "sequencer": "0A", "versionId": "v"},
        },
    }
    native = {"id": "upl-42", "uri": "s3://uploads/a.jpg", "policy": "default@1", "metadata": {"a": [1, {"b": None}]}}
    bridge = {
        "detail-type": "Object Created",
        "source": "aws.s3",
        "time": "2026-11-21T10:00:00Z",
        "detail": {"bucket": {"name": "uploads"}, "object": {"key": "a", "etag": "e", "sequencer": "0B"}},
    }
    event = {"specversion": "1.0", "type": "t", "source": "s", "id": "1", "data": native}
    notification = {"Records": [record, record]}
    documents = [native, notification, bridge, event, event | {"data": notification}, {"Event": "s3:TestEvent"}]
    return [json.dumps(document).encode() for document in documents] + _finds("formats")


def images() -> list[bytes]:
    """Small pictures in every format, and the finds."""
    pictures = [encoded(image, kind) for kind in FORMATS for image in (picture(), textured(64, 48))]
    return [*pictures, draw(1).jpeg, *_finds("images")]


def mutated(seeds: list[bytes], seed: int) -> Iterator[bytes]:
    """The seeds as they are, then changed ones for ever."""
    rng = random.Random(seed)
    yield from seeds
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(1 + int(rng.expovariate(0.5))):
            data = _MUTATIONS[rng.randrange(len(_MUTATIONS))](rng, data, seeds)
        yield bytes(data[:_LONGEST])


def _flip(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _overwrite(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = rng.randrange(len(data) + 1)
    token = rng.choice(_INTERESTING)
    return data[:at] + token + data[at + len(token) :]


def _insert(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([rng.choice(_INTERESTING), rng.randbytes(rng.randint(1, 16))]) + data[at:]


def _delete(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randint(1, 64) :]


def _cut(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(rng: random.Random, data: bytearray, _: list[bytes]) -> bytearray:
    at = rng.randrange(len(data) + 1)
    part = data[at : at + rng.randint(1, 256)]
    return data[:at] + part * rng.randint(2, 40) + data[at:]


def _splice(rng: random.Random, data: bytearray, seeds: list[bytes]) -> bytearray:
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_MUTATIONS: Final = (_flip, _overwrite, _insert, _delete, _cut, _repeat, _splice)


def _finds(kind: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / kind).iterdir()) if file.suffix == ".bin"]
