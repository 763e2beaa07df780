"""Judges a labelled data set on the running service.

No verdict is published, no metric of submissions or actions counts the images, and no bucket is written to.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.evaluation.labels import LabelledImage
from pipelines.evaluation.perturbations import PERTURBATIONS
from pipelines.evaluation.policy_selection import PolicySelector
from pipelines.evaluation.results import ResultColumns
from pipelines.evaluation.row_batches import Batch, BatchPace, BatchReader, PreparedRow
from services.core.errors import Unjudgeable
from services.core.messages import ObjectReference, Submission, Verdict
from services.core.settings import Settings
from services.core.values import Policy

RowWriter = Callable[[dict[str, Any]], None]


class JudgeService(Protocol):
    """A running service, such as `pipelines.clients.judge_client.JudgeClient`."""

    def judge(self, requests: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        """The result of each request, in their order."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What to judge in addition to every row with effort `full`."""

    adaptive: bool = False
    """Judge every row with effort `adaptive`, too."""
    perturbed: int = 0
    """Judge the perturbed images of this many rows: the first ones whose policy waives nothing."""
    seed: int = 0
    """The seed of the noise that perturbs images, and of the resamples."""


class DataSetJudge:
    """Judges one data set. It can be used once."""

    def __init__(
        self,
        service: JudgeService,
        selector: PolicySelector,
        settings: Settings,
        options: EvaluationOptions,
        *,
        keep: Callable[[LabelledImage], bool] = lambda _labelled: True,
        write: RowWriter = lambda _row: None,
        root: Path | None = None,
    ) -> None:
        """
        Args:
            keep: whether a row is wanted. Other rows are counted in `left_out`.
            write: is called with an object for each row: its label with the answer, or why there is none.
        """
        self.columns = ResultColumns()
        self._service = service
        self._options = options
        self._reader = BatchReader(
            selector, settings, keep=keep, perturbed=options.perturbed, seed=options.seed, root=root
        )
        self._write = write

    @property
    def left_out(self) -> int:
        """Rows that `keep` did not want."""
        return self._reader.left_out

    def run(self, records: Iterable[Any], folder: Path, total: int | None, progress: Progress) -> ResultColumns:
        """Judge all records. Relative paths of images begin at `folder`.

        Raises:
            ConfigurationError: the service has ended.
        """
        pace = BatchPace(total, progress)
        with closing(self._reader.read(records, folder, pace)) as batches:
            for batch in batches:
                self._judge(batch)
                pace.advance(len(batch))
        return self.columns

    def _judge(self, batch: Batch) -> None:
        requests: list[JudgeRequest] = []
        for row in batch.rows:
            requests.append(_request(row.labelled.id, row.source, row.row_policy.full))
            if self._options.adaptive:
                requests.append(_request(row.labelled.id, row.source, row.row_policy.adaptive))
            requests += [_request(row.labelled.id, variant, row.row_policy.full) for variant in row.variants]
        judged = self._service.judge(requests, lambda _line: None) if requests else []
        answers = iter([result[0] if isinstance(result, list) else result for result in judged])
        for rejected in batch.rejected:
            self._fail(rejected.id, None, rejected.reason, rejected.detail)
        for row in batch.rows:
            full = next(answers)
            adaptive = next(answers) if self._options.adaptive else None
            self._add(row, full, adaptive, [next(answers) for _ in row.variants])

    def _add(
        self,
        row: PreparedRow,
        full: Verdict | Unjudgeable,
        adaptive: Verdict | Unjudgeable | None,
        variants: Sequence[Verdict | Unjudgeable],
    ) -> None:
        labelled, row_policy = row.labelled, row.row_policy
        if not isinstance(full, Verdict):
            self._fail(labelled.id, labelled, full.reason, str(full))
            return
        index = self.columns.add(labelled, row_policy.waiver_kind, row_policy.category, full)
        if isinstance(adaptive, Verdict):
            self.columns.add_adaptive(index, adaptive)
        for name, variant in zip(PERTURBATIONS[: len(variants)], variants, strict=True):
            if isinstance(variant, Verdict):
                self.columns.add_perturbed(index, name, variant)
        self._write(
            _label(labelled)
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

    def _fail(self, row_id: str, labelled: LabelledImage | None, reason: str, detail: str) -> None:
        self.columns.fail(row_id, reason, detail)
        self._write((_label(labelled) if labelled else {"id": row_id}) | {"error": reason, "detail": detail})


def _request(row_id: str, source: ObjectReference | bytes, policy: Policy) -> JudgeRequest:
    if isinstance(source, bytes):
        return JudgeRequest.of_bytes(row_id or "row", source, policy)
    return JudgeRequest(Submission(id=row_id or "row", uri=source.uri), (policy,))


def _label(labelled: LabelledImage) -> dict[str, Any]:
    return {
        "id": labelled.id,
        "image": "bytes" if isinstance(labelled.image, bytes) else str(labelled.image),
        "expected": labelled.rating,
        "expected_category": labelled.category,
        "waived": sorted(labelled.waived),
    }
