"""Judges the rows of a chunk: each different image once, the others get what was said about it."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.schema import ANNOTATION, Failure, ParquetBuffer, Row, annotation, with_extras
from services.core.errors import Changed, Forbidden, NotFound, Unjudgeable
from services.core.messages import Verdict, verdict_id
from services.core.retry import retry_while_unavailable
from services.core.values import Policy, Priority
from services.moderation.cascade import judge_image
from services.moderation.ports import GuardClient, ImagePreparer
from services.moderation.retrying import RetryingGuard, RetryingPreparer
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import VerdictSubject, build_verdicts

_BACKFILL: Final[Priority] = "backfill"
_REFERENCE_ERRORS: Final = (NotFound, Changed, Forbidden)
"""What is wrong with one reference says nothing about another one to the same bytes."""


class _CachedResult(NamedTuple):
    """What holds for all rows with the same bytes."""

    row: int
    """Which one was judged."""
    answer: Verdict | Failure


class ChunkJudge:
    """Judges chunks under one policy, as submissions are judged; live submissions have priority at the guard."""

    def __init__(
        self, *, images: ImageReader, preparer: ImagePreparer, guard: GuardClient, policy: Policy, in_flight: int
    ) -> None:
        self._images = images
        self._policies = (policy,)
        self._preparer = RetryingPreparer(preparer)
        self._guard = RetryingGuard(guard)
        self._places = asyncio.Semaphore(in_flight)

    async def judge(self, planned: Iterable[pa.Table], extras: pa.Schema) -> ParquetBuffer:
        """The annotations of a chunk, a row for each of its rows, in their order."""
        annotations = ParquetBuffer(with_extras(ANNOTATION, extras))
        cached: dict[int, _CachedResult] = {}
        for table in planned:
            annotations.add(await self._judge_some(table, extras, cached))
        return annotations

    async def _judge_some(self, planned: pa.Table, extras: pa.Schema, cached: dict[int, _CachedResult]) -> pa.Table:
        groups: dict[int, list[Row]] = defaultdict(list)
        for row in planned.to_pylist():
            groups[row["row"] if row["duplicate_of"] is None else row["duplicate_of"]].append(row)
        async with asyncio.TaskGroup() as tasks:
            judging = [
                tasks.create_task(self._judge_same(first, rows, extras.names, cached)) for first, rows in groups.items()
            ]
        rows = [row for task in judging for row in task.result()]
        rows.sort(key=lambda row: int(row["row"]))
        return pa.Table.from_pylist(rows, with_extras(ANNOTATION, extras))

    async def _judge_same(
        self, first: int, rows: list[Row], extras: list[str], cached: dict[int, _CachedResult]
    ) -> list[Row]:
        """The annotations of rows with the same bytes: the first that can be had is judged for all that follow."""
        made: list[Row] = []
        for row in rows:
            duplicate_of = None
            if row["reason"]:
                answer: Verdict | Failure = Failure(row["reason"], row["detail"])
            elif first in cached:
                duplicate_of, answer = cached[first].row, _as_of(row, cached[first].answer)
            else:
                answer, own = await self._judge(row)
                if not own:
                    cached[first] = _CachedResult(row["row"], answer)
            made.append(annotation(row | {"duplicate_of": duplicate_of}, answer, extras))
        return made

    async def _judge(self, row: Row) -> tuple[Verdict | Failure, bool]:
        """The answer, and whether it says something about this reference only."""
        async with self._places:
            try:
                return await retry_while_unavailable(lambda: self._judge_now(row)), False
            except Unjudgeable as error:
                return Failure(error.reason, str(error)), isinstance(error, _REFERENCE_ERRORS)

    async def _judge_now(self, row: Row) -> Verdict:
        subject = VerdictSubject(row["id"], row["uri"], row["tenant"])
        async with self._images.open(row) as stored:
            timer = StepTimer.start()
            judged = await judge_image(
                stored.data, self._policies, priority=_BACKFILL, guard=self._guard, preparer=self._preparer, timer=timer
            )
        (answer,) = build_verdicts(subject, stored, self._policies, judged, timer)
        if not isinstance(answer, Verdict):
            raise answer
        if answer.sha256 != row["sha256"]:
            raise Changed(f"{row['uri']} has other bytes than when it was indexed")
        return answer


def _as_of(row: Row, answer: Verdict | Failure) -> Verdict | Failure:
    """The same answer, as if this row had been judged."""
    if isinstance(answer, Failure):
        return answer
    own: dict[str, Any] = {name: row[name] for name in ("uri", "version_id", "etag", "tenant")}
    identity = verdict_id(
        submission_id=row["id"],
        uri=row["uri"],
        object_version=row["version_id"] or row["etag"] or row["sha256"],
        policy_digest=answer.policy.digest if answer.policy else "",
        model_revision=answer.model.revision if answer.model else "",
        calibration=answer.calibration.digest if answer.calibration else None,
    )
    return answer.model_copy(update=own | {"submission_id": row["id"], "verdict_id": identity})
