"""Judges a labelled data set on the running service. Nothing is published or counted, and no bucket is written to.

Rows go in batches. A file or bytes travel with the request to judge them; an s3:// image is fetched by the service.
While one batch is judged, the files of the next are read.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.evaluation.labels import Image, LabelledImage, Reason, RejectedRecord, parse
from pipelines.evaluation.metrics import DEFAULT
from pipelines.evaluation.perturbations import PERTURBATIONS, perturbed
from pipelines.evaluation.policies import PolicySelector, RowPolicy
from pipelines.evaluation.results import Columns
from services.core.errors import Unavailable, Unjudgeable
from services.core.messages import ObjectReference, Submission, Verdict
from services.core.settings import Settings
from services.core.values import Policy
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore

_READERS: Final = 8
_BATCH_S: Final = 10.0
"""What a batch should take: long enough that its end does not leave the service idle, short enough for a word."""
_FIRST_BATCH: Final = 32
_BATCH_LIMIT: Final = 1024
_PERTURBED_BATCH: Final = 8
"""Rows of a batch while images are perturbed: each of these images is in memory with all of its variants."""
_BATCH_BYTES: Final = 64 << 20
_URI_LIMIT: Final = 2048
_PICTURE_PX: Final = 2048
"""Perturbed images are no larger."""

RowWriter = Callable[[dict[str, Any]], None]


class JudgeService(Protocol):
    """A running service: see pipelines.clients.judge_client."""

    def judge(self, trials: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        """The outcome of each trial, in their order."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is judged besides every row under its policy with effort `full`."""

    adaptive: bool = False
    """Every row with effort `adaptive`, too."""
    perturbed: int = 0
    """So many of the first rows without a waiver, after each of the perturbations."""
    seed: int = 0
    """Of the noise."""


@dataclass(slots=True)
class _Row:
    """One row of a batch, with its image."""

    sample: LabelledImage
    row_policy: RowPolicy
    source: ObjectReference | bytes
    """Where the service reads the image, or the image itself."""
    variants: list[bytes]
    """The image after each perturbation, as JPEG files."""


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Why a row has no image to judge."""

    reason: Reason
    detail: str


@dataclass(slots=True)
class _Batch:
    rows: list[_Row] = field(default_factory=list)
    refused: list[RejectedRecord] = field(default_factory=list)


class SampleJudge:
    """Judges one data set. Not to be used twice."""

    def __init__(
        self,
        service: JudgeService,
        selector: PolicySelector,
        settings: Settings,
        options: EvaluationOptions,
        *,
        keep: Callable[[LabelledImage], bool] = lambda _sample: True,
        write: RowWriter = lambda _row: None,
    ) -> None:
        """
        Args:
            keep: which rows are wanted; the others are left out, and counted as `left_out`.
            write: gets an object for every row: what was expected and what came, or why nothing did.
        """
        self.columns = Columns()
        self._service = service
        self._selector = selector
        self._settings = settings
        self._options = options
        self.left_out = 0
        self._keeps = keep
        self._write = write
        self._to_perturb = options.perturbed

    def run(self, records: Iterable[Any], folder: Path, total: int | None, progress: Progress) -> Columns:
        """Judge all records.

        Raises:
            ConfigurationError: the service has ended.
        """
        pace = _Pace(total, progress)
        batches = self._batches(records, folder, pace)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as readers, ThreadPoolExecutor(1) as ahead:
            self._readers = readers
            preparing = ahead.submit(self._prepare, next(batches, []))
            while True:
                batch = preparing.result()
                following = next(batches, [])
                preparing = ahead.submit(self._prepare, following)
                self._judge(batch)
                pace.advance(len(batch.rows) + len(batch.refused))
                if not following:
                    break
        return self.columns

    def _batches(
        self, records: Iterable[Any], folder: Path, pace: "_Pace"
    ) -> Iterator[list[LabelledImage | RejectedRecord]]:
        batch: list[LabelledImage | RejectedRecord] = []
        held_bytes = 0
        for number, record in enumerate(records, start=1):
            found = parse(record, number, folder)
            if isinstance(found, LabelledImage) and not self._keeps(found):
                self.left_out += 1
                continue
            batch.append(found)
            held_bytes += _size(found.image) if isinstance(found, LabelledImage) else 0
            rows = _PERTURBED_BATCH if self._to_perturb else pace.batch
            if len(batch) >= rows or held_bytes > _BATCH_BYTES:
                yield batch
                batch, held_bytes = [], 0
        if batch:
            yield batch

    def _prepare(self, found: Sequence[LabelledImage | RejectedRecord]) -> _Batch:
        """Choose the policy of each row and read its image."""
        batch = _Batch()
        chosen: list[tuple[LabelledImage, RowPolicy]] = []
        for each in found:
            row_policy = each if isinstance(each, RejectedRecord) else self._selector.of(each)
            if isinstance(row_policy, RejectedRecord):
                batch.refused.append(row_policy)
            elif isinstance(each, LabelledImage):
                chosen.append((each, row_policy))
        images = dict.fromkeys(sample.image for sample, _ in chosen)
        sources = dict(zip(images, self._readers.map(self._read, images), strict=True))
        for sample, row_policy in chosen:
            source = sources[sample.image]
            if isinstance(source, _Unreadable):
                batch.refused.append(RejectedRecord(sample.id, source.reason, source.detail))
            else:
                batch.rows.append(_Row(sample, row_policy, source, []))
        self._perturb(batch)
        return batch

    def _read(self, image: Image) -> "ObjectReference | bytes | _Unreadable":
        """The bytes of a file or of the data set, or the object that the service fetches itself."""
        if isinstance(image, str):
            if len(image) <= _URI_LIMIT:
                with suppress(ValueError):
                    return ObjectReference.from_uri(image)
            return _Unreadable("no_image", f"its image {image[:80]} names no object")
        limit = self._settings.image_limit_bytes
        try:
            if isinstance(image, Path) and not image.is_file():
                return _Unreadable("no_image", f"its image {str(image)[:80]} does not exist")
            if (size := _size(image)) > limit:
                return _Unreadable("too_large", f"its image has {size} bytes, the limit is {limit}")
            return image if isinstance(image, bytes) else image.read_bytes()
        except OSError as error:
            return _Unreadable("no_image", f"its image {str(image)[:80]} cannot be read: {error.strerror}")

    def _perturb(self, batch: _Batch) -> None:
        rows = [row for row in batch.rows if row.row_policy.kind == DEFAULT][: self._to_perturb]
        if not rows:
            return
        self._to_perturb -= len(rows)
        for row, picture in zip(rows, asyncio.run(_pictures(rows, self._settings)), strict=True):
            if picture is not None:
                row.variants = list(perturbed(picture, self._options.seed))

    def _judge(self, batch: _Batch) -> None:
        requests: list[JudgeRequest] = []
        for row in batch.rows:
            requests.append(_request(row.sample.id, row.source, row.row_policy.full))
            if self._options.adaptive:
                requests.append(_request(row.sample.id, row.source, row.row_policy.adaptive))
            requests += [_request(row.sample.id, variant, row.row_policy.full) for variant in row.variants]
        outcomes = iter(map(_only, self._service.judge(requests, lambda _line: None) if requests else []))
        for refused in batch.refused:
            self._fail(refused.id, None, refused.reason, refused.detail)
        for row in batch.rows:
            full = next(outcomes)
            adaptive = next(outcomes) if self._options.adaptive else None
            variants = [next(outcomes) for _ in row.variants]
            self._keep(row, full, adaptive, variants)

    def _keep(
        self,
        row: _Row,
        full: Verdict | Unjudgeable,
        adaptive: Verdict | Unjudgeable | None,
        variants: Sequence[Verdict | Unjudgeable],
    ) -> None:
        sample, row_policy = row.sample, row.row_policy
        if not isinstance(full, Verdict):
            self._fail(sample.id, sample, full.reason, str(full))
            return
        place = self.columns.add(sample, row_policy.kind, row_policy.category, full)
        if isinstance(adaptive, Verdict):
            self.columns.add_adaptive(place, adaptive)
        for name, variant in zip(PERTURBATIONS[: len(variants)], variants, strict=True):
            if isinstance(variant, Verdict):
                self.columns.add_perturbed(place, name, variant)
        self._write(
            _described(sample)
            | {
                "rating": full.rating,
                "category": full.category,
                "score": full.score,
                "action": full.action,
                "adaptive_rating": adaptive.rating if isinstance(adaptive, Verdict) else None,
                "effort": adaptive.effort if isinstance(adaptive, Verdict) else None,
                "ms": full.timings_ms.total,
            }
        )

    def _fail(self, name: str, sample: LabelledImage | None, reason: str, detail: str) -> None:
        self.columns.fail(name, reason, detail)
        self._write((_described(sample) if sample else {"id": name}) | {"error": reason, "detail": detail})


class _Pace:
    """How fast it goes: a word after each batch, and how large the next one should be."""

    def __init__(self, total: int | None, progress: Progress) -> None:
        self.batch = _FIRST_BATCH
        self._total = total
        self._progress = progress
        self._done = 0
        self._started = self._last = time.monotonic()

    def advance(self, rows: int) -> None:
        if not rows:
            return
        now = time.monotonic()
        self.batch = round(min(max(rows / max(now - self._last, 1e-3) * _BATCH_S, _FIRST_BATCH), _BATCH_LIMIT))
        self._last = now
        self._done += rows
        rate = self._done / max(now - self._started, 1e-3)
        of, left = "", ""
        if self._total:
            of, left = f" of {self._total:,}", f", {_duration(max(0, self._total - self._done) / rate)} left"
        self._progress(f"{self._done:,}{of} rows, {rate:.1f} a second{left}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _request(name: str, source: ObjectReference | bytes, policy: Policy) -> JudgeRequest:
    if isinstance(source, bytes):
        return JudgeRequest.of_bytes(name or "row", source, policy)
    return JudgeRequest(Submission(id=name or "row", uri=source.uri), (policy,))


def _only(outcome: JudgeResult) -> Verdict | Unjudgeable:
    return outcome[0] if isinstance(outcome, list) else outcome


def _described(sample: LabelledImage) -> dict[str, Any]:
    image = "bytes" if isinstance(sample.image, bytes) else str(sample.image)
    return {
        "id": sample.id,
        "image": image,
        "expected": sample.rating,
        "expected_category": sample.category,
        "waived": sorted(sample.waived),
    }


def _size(image: Image) -> int:
    """The bytes that an image takes in memory: none if the service fetches it, or if its file cannot be read."""
    if isinstance(image, bytes):
        return len(image)
    try:
        return image.stat().st_size if isinstance(image, Path) else 0
    except (OSError, ValueError):
        return 0


async def _pictures(rows: Sequence[_Row], settings: Settings) -> list[bytes | None]:
    """Each image as the guard would see it, None where it cannot be had: what strangers made is decoded apart."""
    store, preparer = ObjectStore(settings), DecoderPool(settings, _PICTURE_PX)
    try:
        found: list[bytes | None] = []
        for row in rows:
            try:
                if isinstance(row.source, bytes):
                    found.append((await preparer.prepare(row.source)).data)
                else:
                    async with store.open(row.source) as stored:
                        found.append((await preparer.prepare(stored.data)).data)
            except (Unjudgeable, Unavailable):
                found.append(None)  # judging the row itself reports the reason
        return found
    finally:
        preparer.close()
        store.close()
