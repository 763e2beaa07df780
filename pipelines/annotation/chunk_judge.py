"""Judges the images of a chunk. Rows with the same bytes are judged once and share the answer."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.image_row import ImageRow, PlannedImage
from pipelines.annotation.schema import ANNOTATION, Failure, ParquetBuffer, add_source_columns, make_annotation
from services.core.errors import Forbidden, NotFound, ObjectChanged, Unjudgeable
from services.core.messages import Verdict, make_verdict_id
from services.core.retry import retry_while_unavailable
from services.core.values import Policy, Priority
from services.moderation.cascade import judge_image
from services.moderation.ports import GuardClient, ImagePreparer
from services.moderation.retrying_ports import RetryingGuard, RetryingPreparer
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import VerdictSubject, build_verdicts

_PRIORITY: Final[Priority] = "backfill"
_REFERENCE_ERRORS: Final = (NotFound, ObjectChanged, Forbidden)
"""Errors of one reference. Another reference to the same bytes may still be readable."""


class _CachedAnswer(NamedTuple):
    """The answer for all rows with the same bytes."""

    row: int
    """The row that was judged."""
    answer: Verdict | Failure


class ChunkJudge:
    """Judges chunks under one policy, as submissions are judged. Live submissions have priority at the guard."""

    def __init__(
        self, *, images: ImageReader, preparer: ImagePreparer, guard: GuardClient, policy: Policy, in_flight: int
    ) -> None:
        self._images = images
        self._policies = (policy,)
        self._preparer = RetryingPreparer(preparer)
        self._guard = RetryingGuard(guard)
        self._slots = asyncio.Semaphore(in_flight)

    async def judge(self, planned: Iterable[pa.Table], source_columns: pa.Schema) -> ParquetBuffer:
        """The annotations of a chunk: one for each of its rows, in the same order."""
        annotations = ParquetBuffer(add_source_columns(ANNOTATION, source_columns))
        cached: dict[int, _CachedAnswer] = {}
        for table in planned:
            annotations.add(await self._judge_table(table, source_columns, cached))
        return annotations

    async def _judge_table(
        self, table: pa.Table, source_columns: pa.Schema, cached: dict[int, _CachedAnswer]
    ) -> pa.Table:
        groups: dict[int, list[PlannedImage]] = defaultdict(list)
        for columns in table.to_pylist():
            planned = PlannedImage.from_columns(columns)
            groups[planned.row if planned.duplicate_of is None else planned.duplicate_of].append(planned)
        async with asyncio.TaskGroup() as tasks:
            judging = [tasks.create_task(self._judge_duplicates(first, same, cached)) for first, same in groups.items()]
        annotations = [columns for task in judging for columns in task.result()]
        annotations.sort(key=lambda columns: int(columns["row"]))
        return pa.Table.from_pylist(annotations, add_source_columns(ANNOTATION, source_columns))

    async def _judge_duplicates(
        self, first: int, same: Sequence[PlannedImage], cached: dict[int, _CachedAnswer]
    ) -> list[dict[str, Any]]:
        """The annotations of images with the same bytes. One readable image is judged; the others get its answer."""
        annotations: list[dict[str, Any]] = []
        for planned in same:
            image, duplicate_of = planned.image, None
            if image.reason:
                answer: Verdict | Failure = Failure(image.reason, image.detail or "")
            elif first in cached:
                duplicate_of, answer = cached[first].row, _reuse(cached[first].answer, image)
            else:
                answer, is_shared = await self._judge(image)
                if is_shared:
                    cached[first] = _CachedAnswer(planned.row, answer)
            annotations.append(make_annotation(planned, answer, duplicate_of))
        return annotations

    async def _judge(self, image: ImageRow) -> tuple[Verdict | Failure, bool]:
        """The answer, and whether it holds for every image with the same bytes."""
        async with self._slots:
            try:
                return await retry_while_unavailable(lambda: self._judge_once(image)), True
            except Unjudgeable as error:
                return Failure(error.reason, str(error)), not isinstance(error, _REFERENCE_ERRORS)

    async def _judge_once(self, image: ImageRow) -> Verdict:
        subject = VerdictSubject(image.id, image.uri, image.tenant)
        async with self._images.open(image) as stored:
            timer = StepTimer.start()
            judged = await judge_image(
                stored.data, self._policies, priority=_PRIORITY, guard=self._guard, preparer=self._preparer, timer=timer
            )
        (answer,) = build_verdicts(subject, stored, self._policies, judged, timer)
        if not isinstance(answer, Verdict):
            raise answer
        if answer.sha256 != image.sha256:
            raise ObjectChanged(f"{image.uri} has changed since it was indexed")
        return answer


def _reuse(answer: Verdict | Failure, image: ImageRow) -> Verdict | Failure:
    """The answer for another image with the same bytes, as if that image had been judged."""
    if isinstance(answer, Failure):
        return answer
    identity = make_verdict_id(
        submission_id=image.id,
        uri=image.uri,
        object_version=image.version_id or image.etag or image.sha256 or "",
        policy_digest=answer.policy.digest if answer.policy else "",
        model_revision=answer.model.revision if answer.model else "",
        calibration=answer.calibration.digest if answer.calibration else None,
    )
    return answer.model_copy(
        update={
            "uri": image.uri,
            "version_id": image.version_id,
            "etag": image.etag,
            "tenant": image.tenant,
            "submission_id": image.id,
            "verdict_id": identity,
        }
    )
