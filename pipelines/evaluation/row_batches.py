"""Reads the rows of a data set in batches: chooses the policy of each row, reads its image, and perturbs some images.

A file, or bytes of the data set, are read here because they travel with the request to judge them. The service fetches
s3:// images itself. While one batch is judged, the next is read.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipelines.clients.judge_client import Progress
from pipelines.clients.local_images import read_local_image
from pipelines.evaluation.labels import Image, LabelledImage, RejectedRecord, RejectionReason, parse_record
from pipelines.evaluation.metrics import NOTHING_WAIVED
from pipelines.evaluation.perturbations import perturb
from pipelines.evaluation.policy_selection import PolicySelector, RowPolicy
from pipelines.reporting.text import format_duration
from services.core.errors import Forbidden, NotAnImage, NotFound, Unavailable, Unjudgeable
from services.core.messages import ObjectReference
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore

_READERS: Final = 8
_BATCH_S: Final = 10.0
"""How long the service should take for a batch: long enough to keep it busy, short enough for frequent progress."""
_FIRST_BATCH_ROWS: Final = 32
_BATCH_ROWS_LIMIT: Final = 1024
_PERTURBED_BATCH_ROWS: Final = 8
"""Rows of a batch while images are perturbed, because each such image is in memory with all of its variants."""
_BATCH_BYTES: Final = 64 << 20
_URI_LIMIT: Final = 2048
_SHOWN_CHARACTERS: Final = 80
_PERTURBED_PX: Final = 2048
"""The longer side of a perturbed image is scaled down to this."""


@dataclass(slots=True)
class PreparedRow:
    """A row that is ready to be judged."""

    labelled: LabelledImage
    row_policy: RowPolicy
    source: ObjectReference | bytes
    """The object that the service fetches, or the image file itself."""
    variants: list[bytes] = field(default_factory=list)
    """The image after each perturbation, as JPEG; empty if it is not perturbed."""


@dataclass(slots=True)
class Batch:
    """Rows to judge together, and records that cannot be judged."""

    rows: list[PreparedRow] = field(default_factory=list)
    rejected: list[RejectedRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) + len(self.rejected)


class BatchPace:
    """Chooses the size of the next batch by the speed of the last one, and reports progress."""

    def __init__(self, total: int | None, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        """`total`: the rows of the data set; None if unknown."""
        self.rows = _FIRST_BATCH_ROWS
        self._total = total
        self._progress = progress
        self._clock = clock
        self._done = 0
        self._started = self._last = clock()

    def advance(self, rows: int) -> None:
        """Count the rows of a batch that is finished."""
        if not rows:
            return
        now = self._clock()
        rows_per_batch = rows / max(now - self._last, 1e-3) * _BATCH_S
        self.rows = round(min(max(rows_per_batch, _FIRST_BATCH_ROWS), _BATCH_ROWS_LIMIT))
        self._last = now
        self._done += rows
        rate = self._done / max(now - self._started, 1e-3)
        total, left = "", ""
        if self._total:
            total, left = f" of {self._total:,}", f", {format_duration(max(0, self._total - self._done) / rate)} left"
        self._progress(f"{self._done:,}{total} rows, {rate:.1f} a second{left}")


class BatchReader:
    """Reads one data set. It can be used once."""

    def __init__(
        self,
        selector: PolicySelector,
        settings: Settings,
        *,
        keep: Callable[[LabelledImage], bool],
        perturbed: int,
        seed: int,
        root: Path | None = None,
    ) -> None:
        """
        Args:
            keep: whether a row is wanted. Other rows are counted in `left_out`.
            perturbed: how many rows to perturb: the first ones whose policy waives nothing.
            seed: of the noise.
            root: the folder whose files may be sent. Default: the folder of the data set.
        """
        self.left_out = 0
        self._selector = selector
        self._settings = settings
        self._keep = keep
        self._to_perturb = perturbed
        self._seed = seed
        self._root = root

    def read(self, records: Iterable[Any], folder: Path, pace: BatchPace) -> Generator[Batch]:
        """The batches of all records. The caller judges one while the next is read."""
        self._root = self._root or folder
        parsed = self._parse(records, folder, pace)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as readers, ThreadPoolExecutor(1) as ahead:

            def prepare(found: Sequence[LabelledImage | RejectedRecord]) -> Batch:
                return self._prepare(found, readers)

            preparing = ahead.submit(prepare, next(parsed, []))
            while True:
                batch = preparing.result()
                following = next(parsed, [])
                preparing = ahead.submit(prepare, following)
                yield batch
                if not following:
                    return

    def _parse(
        self, records: Iterable[Any], folder: Path, pace: BatchPace
    ) -> Iterator[list[LabelledImage | RejectedRecord]]:
        batch: list[LabelledImage | RejectedRecord] = []
        batch_bytes = 0
        for number, record in enumerate(records, start=1):
            found = parse_record(record, number, folder)
            if isinstance(found, LabelledImage) and not self._keep(found):
                self.left_out += 1
                continue
            batch.append(found)
            batch_bytes += _size(found.image) if isinstance(found, LabelledImage) else 0
            rows = _PERTURBED_BATCH_ROWS if self._to_perturb else pace.rows
            if len(batch) >= rows or batch_bytes > _BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
        if batch:
            yield batch

    def _prepare(self, found: Sequence[LabelledImage | RejectedRecord], readers: ThreadPoolExecutor) -> Batch:
        batch = Batch()
        chosen: list[tuple[LabelledImage, RowPolicy]] = []
        for each in found:
            row_policy = each if isinstance(each, RejectedRecord) else self._selector.select(each)
            if isinstance(row_policy, RejectedRecord):
                batch.rejected.append(row_policy)
            elif isinstance(each, LabelledImage):
                chosen.append((each, row_policy))
        images = dict.fromkeys(labelled.image for labelled, _ in chosen)
        sources = dict(zip(images, readers.map(self._read_image, images), strict=True))
        for labelled, row_policy in chosen:
            source = sources[labelled.image]
            if isinstance(source, _Unreadable):
                batch.rejected.append(RejectedRecord(labelled.id, source.reason, source.detail))
            else:
                batch.rows.append(PreparedRow(labelled, row_policy, source))
        self._perturb(batch)
        return batch

    def _read_image(self, image: Image) -> "ObjectReference | bytes | _Unreadable":
        if isinstance(image, str):
            if len(image) <= _URI_LIMIT:
                with suppress(ValueError):
                    return ObjectReference.from_uri(image)
            return _Unreadable("no_image", f"its image {image[:_SHOWN_CHARACTERS]} is not the URI of an object")
        limit, shown = self._settings.image_limit_bytes, str(image)[:_SHOWN_CHARACTERS]
        try:
            if (size := _size(image)) > limit:
                return _Unreadable("too_large", f"its image has {size} bytes, the limit is {limit}")
            return image if isinstance(image, bytes) else read_local_image(image, self._root or image.parent, limit)
        except NotFound:
            return _Unreadable("no_image", f"its image {shown} does not exist")
        except Unjudgeable as error:
            remedy = "; --root allows another folder" if isinstance(error, Forbidden) else ""
            reason: RejectionReason = "not_an_image" if isinstance(error, NotAnImage) else "no_image"
            return _Unreadable(reason, f"its image cannot be used: {error}{remedy}")

    def _perturb(self, batch: Batch) -> None:
        rows = [row for row in batch.rows if row.row_policy.waiver_kind == NOTHING_WAIVED][: self._to_perturb]
        if not rows:
            return
        self._to_perturb -= len(rows)
        for row, image in zip(rows, asyncio.run(_decode(rows, self._settings)), strict=True):
            if image is not None:
                row.variants = perturb(image, self._seed)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Why the image of a row is not readable."""

    reason: RejectionReason
    detail: str


async def _decode(rows: Sequence[PreparedRow], settings: Settings) -> list[bytes | None]:
    """Each image as the guard would get it; None if it is not readable. Untrusted images are decoded in a sandbox."""
    store, preparer = ObjectStore(settings), DecoderPool(settings, _PERTURBED_PX)
    try:
        images: list[bytes | None] = []
        for row in rows:
            try:
                if isinstance(row.source, bytes):
                    images.append((await preparer.prepare(row.source)).data)
                else:
                    async with store.open(row.source) as stored:
                        images.append((await preparer.prepare(stored.data)).data)
            except (Unjudgeable, Unavailable):
                images.append(None)  # judging the row itself reports the reason
        return images
    finally:
        preparer.close()
        store.close()


def _size(image: Image) -> int:
    """The bytes that an image takes in memory: 0 if the service fetches it, or if its file cannot be read."""
    if isinstance(image, bytes):
        return len(image)
    try:
        return image.stat().st_size if isinstance(image, Path) else 0
    except (OSError, ValueError):
        return 0
