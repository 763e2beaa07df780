"""Judges assessments in jobs: tasks that may outlive the requests that start them."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from services.core.tasks import cancel_and_wait
from services.core.values import Detail
from services.gateway.admission import AdmittedRequest
from services.gateway.assessment_store import AssessmentStore, StoredAssessment
from services.gateway.problems import HttpProblem, to_problem
from services.gateway.submitted_images import SubmittedImage

_POLL_S: Final = 0.1
_RETRYABLE_STATUSES: Final = frozenset({429, 500, 503})
"""If an assessment failed with one of these, its idempotency key may be judged again."""


@dataclass(frozen=True, slots=True)
class AssessmentJob:
    """One image to judge, and how."""

    image: SubmittedImage
    detail: Detail
    request_digest: str
    """SHA-256 of the fields that identify the image and how to judge it."""


class AssessmentJobs:
    """The jobs of this process."""

    def __init__(self, store: AssessmentStore) -> None:
        self._store = store
        self._tasks: dict[str, asyncio.Task[StoredAssessment]] = {}

    async def claim(self, idempotency_key: str, job: AssessmentJob, pending: StoredAssessment) -> str:
        """Return the id of an idempotency key's assessment: `pending`, or that of an earlier request with the key.

        Raises:
            HttpProblem: an earlier request with the key was different.
        """
        known = await self._store.claim(idempotency_key, job.request_digest, pending)
        if known.request_digest != job.request_digest:
            raise HttpProblem("idempotency-key-reused", "an earlier request with this idempotency key was different")
        if known.assessment_id != pending.id:
            stored = await self._store.get(known.assessment_id)
            problem = stored.problem if stored else None
            may_retry = stored is None or (problem is not None and problem["status"] in _RETRYABLE_STATUSES)
            # If several requests find a temporary failure, one of them replaces it and judges the image again.
            if may_retry and await self._store.replace(idempotency_key, known, pending):
                return pending.id
        return known.assessment_id

    async def start(
        self, pending: StoredAssessment, job: AssessmentJob, admitted: AdmittedRequest
    ) -> asyncio.Task[StoredAssessment]:
        """Start a job. Returns its task, whose result is the finished assessment.

        Raises:
            HttpProblem: the API key has too many jobs.
        """
        try:
            resources = admitted.start_job()
        except HttpProblem as problem:
            # Other requests may already wait for the pending assessment, so it is finished.
            await self._store.finish(pending.with_problem(problem))
            raise
        resources.enter_context(self._store.renew(pending))
        task = asyncio.create_task(self._run(pending, job, admitted, resources))
        self._tasks[pending.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(pending.id, None))
        return task

    async def wait_for_result(self, assessment_id: str, wait_s: float) -> StoredAssessment | None:
        """Return an assessment of any process, when it is finished or after `wait_s` seconds. None if it is absent."""
        deadline = asyncio.get_running_loop().time() + wait_s
        if task := self._tasks.get(assessment_id):
            await asyncio.wait([task], timeout=wait_s)
            if task.done():
                return task.result()
        while True:
            stored = await self._store.get(assessment_id)
            if stored is None or not stored.is_pending or asyncio.get_running_loop().time() >= deadline:
                return stored
            await asyncio.sleep(_POLL_S)

    async def drain(self, within_s: float) -> None:
        """Finish the jobs. Jobs that take longer than `within_s` are cancelled; clients then get `interrupted`."""
        if tasks := list(self._tasks.values()):
            _, late = await asyncio.wait(tasks, timeout=within_s)
            await asyncio.gather(*map(cancel_and_wait, late))

    async def _run(
        self, pending: StoredAssessment, job: AssessmentJob, admitted: AdmittedRequest, resources: ExitStack
    ) -> StoredAssessment:
        with resources:
            try:
                done = pending.with_verdict(await admitted.judge(job.image, job.detail))
            except Exception as error:  # noqa: BLE001 - any error is the result that clients get
                done = pending.with_problem(to_problem(error, f"assessment {pending.id}"))
            await self._store.finish(done)
            return done
