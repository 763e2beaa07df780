"""The submissions of a run, with the outcome that each should have."""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from pipelines.tiny_guard.drawings import draw
from services.core.errors import DeadLetterReason
from services.core.values import Rating
from tests.faults.guard import rating_of
from tests.faults.s3 import BUCKET

KEYS: Final = 64
"""Keys that producers set, so that many submissions share one."""

_PICTURES: Final = 8
_REFUSED: Final = "refused"
_NO_IMAGE: Final = "text"
_SHARE_OF_DEAD: Final = 0.03
_SHARE_OF_OVERTAKEN: Final = 0.005
_REASONS: Final[tuple[DeadLetterReason, ...]] = (
    "malformed",
    "not_found",
    "forbidden",
    "not_an_image",
    "unknown_policy",
    "guard_failed",
    "changed",
)


@dataclass(frozen=True, slots=True)
class ExpectedOutcome:
    """The outcome that one submission should have."""

    submission_id: str | None
    """None if the message has no readable id."""
    reason: DeadLetterReason | None = None
    """Reason of the dead letter; None: it is a verdict."""
    sha256: str | None = None
    rating: Rating | None = None
    may_be_superseded: bool = False


@dataclass(frozen=True, slots=True)
class Submitted:
    """One message for the stream of submissions; no two have the same value."""

    value: bytes
    key: bytes | None
    expected: tuple[ExpectedOutcome, ...]


class Pictures:
    """A handful of images in a folder, which the S3 server shows under any number of keys."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        drawn = {str(n): draw(seed + n, size=(96, 72)).jpeg for n in range(_PICTURES)}
        self.drawn = tuple(drawn)
        self.sha256: dict[str, str] = {}
        for name, data in (drawn | {_REFUSED: draw(seed + _PICTURES, size=(96, 72)).jpeg, _NO_IMAGE: b"text"}).items():
            (folder / name).write_bytes(data)
            self.sha256[name] = hashlib.sha256(data).hexdigest()

    @property
    def refused(self) -> str:
        """SHA-256 of the image that the guard refuses."""
        return self.sha256[_REFUSED]


def submissions(seed: int, total: int, pictures: Pictures) -> list[Submitted]:
    """Messages with `total` submissions in all, the same ones for the same arguments."""
    return list(_Maker(seed, pictures).messages(total))


def endless(seed: int, pictures: Pictures) -> Iterator[Submitted]:
    """Messages for as long as they are asked for."""
    return _Maker(seed, pictures).messages(sys.maxsize)


class _Maker:
    def __init__(self, seed: int, pictures: Pictures) -> None:
        self._random = random.Random(seed)
        self._pictures = pictures
        self._numbers = count()

    def messages(self, total: int) -> Iterator[Submitted]:
        # Every reason once at least, however few there are.
        owed = list(_REASONS)
        left = total
        while left:
            dice = self._random.random()
            if dice < _SHARE_OF_DEAD or (owed and left <= len(owed)):
                made = [self._doomed(owed.pop() if owed else self._random.choice(_REASONS))]
            elif dice < _SHARE_OF_DEAD + _SHARE_OF_OVERTAKEN and left >= 3:
                made = self._overtaken()
            elif dice < 0.1 and left >= 3:
                made = [self._event(3)]
            elif dice < 0.4:
                made = [self._event(1)]
            else:
                made = [self._native()]
            left -= sum(len(each.expected) for each in made)
            yield from made

    def _native(self) -> Submitted:
        name = self._id()
        picture, expected = self._judged(name)
        document = {"id": name, "uri": f"s3://{BUCKET}/{picture}/{name}.jpg", "metadata": {"from": "the fault suite"}}
        return Submitted(_encoded(document), self._key(), (expected,))

    def _event(self, records: int) -> Submitted:
        """A notification of S3 about new objects."""
        made = []
        for _ in range(records):
            picture = self._random.choice(self._pictures.drawn)
            made.append(self._record(picture, f"{picture}/{self._id()}.jpg", self._random.randrange(1, 1 << 40)))
        outcomes = tuple(expected for _, expected in made)
        return Submitted(_encoded({"Records": [record for record, _ in made]}), self._key(), outcomes)

    def _overtaken(self) -> list[Submitted]:
        """Three events about one object, of which only the last has to be judged."""
        picture = self._random.choice(self._pictures.drawn)
        key, first = f"{picture}/{self._id()}.jpg", self._random.randrange(1, 1 << 39)
        made = [self._record(picture, key, first + n, is_newest=n == 2) for n in range(3)]
        uri = f"s3://{BUCKET}/{key}".encode()
        return [Submitted(_encoded({"Records": [record]}), uri, (expected,)) for record, expected in made]

    def _record(
        self, picture: str, key: str, sequencer: int, *, is_newest: bool = True
    ) -> tuple[dict[str, Any], ExpectedOutcome]:
        stored = {"key": key, "sequencer": f"{sequencer:016X}"}
        record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": BUCKET}, "object": stored}}
        _, expected = self._judged(f"{BUCKET}/{key}#{stored['sequencer']}", picture, may_be_superseded=not is_newest)
        return record, expected

    def _doomed(self, reason: DeadLetterReason) -> Submitted:
        name = self._id()
        if reason == "malformed" and self._random.random() < 0.5:
            return Submitted(f"{name} is no JSON".encode(), self._key(), (ExpectedOutcome(None, reason),))
        picture = {"not_an_image": _NO_IMAGE, "guard_failed": _REFUSED, "not_found": "nowhere"}.get(reason, "0")
        bucket = "forbidden" if reason == "forbidden" else BUCKET
        document = {"id": name, "uri": f"s3://{bucket}/{picture}/{name}.jpg"}
        if reason == "malformed":
            document["uri"] = f"https://{name}"
        elif reason == "unknown_policy":
            document["policy"] = self._random.choice(("nobody", "default@77"))
        elif reason == "changed":
            document["etag"] = "0" * 32
        return Submitted(_encoded(document), self._key(), (ExpectedOutcome(name, reason),))

    def _judged(
        self, name: str, picture: str | None = None, *, may_be_superseded: bool = False
    ) -> tuple[str, ExpectedOutcome]:
        picture = picture or self._random.choice(self._pictures.drawn)
        sha256 = self._pictures.sha256[picture]
        expected = ExpectedOutcome(name, sha256=sha256, rating=rating_of(sha256), may_be_superseded=may_be_superseded)
        return picture, expected

    def _key(self) -> bytes | None:
        return f"user-{self._random.randrange(KEYS)}".encode() if self._random.random() < 0.6 else None

    def _id(self) -> str:
        return f"f-{next(self._numbers)}"


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
