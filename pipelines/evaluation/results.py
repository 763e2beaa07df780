"""Collects the results of judged rows as columns of numbers: about 80 bytes a row."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.bootstrap import Floats
from pipelines.evaluation.labels import Image, LabelledImage
from pipelines.evaluation.metrics import SAFE, UNREADABLE, UNSAFE, JudgedRows
from services.core.messages import Verdict
from services.core.values import CATEGORIES, NO_CATEGORY, ModelIdentity

STEPS: Final = ("fetch", "prepare", "guard", "total")
_EXAMPLES: Final = 20
_NAN: Final = float("nan")
_ACTIONS: Final = ("allow", "review", "block")


@dataclass(frozen=True, slots=True)
class AdaptiveColumns:
    """Results with effort `adaptive`, as columns of equal length."""

    rows: NDArray[np.int64]
    """Indexes of the judged rows."""
    predicted: NDArray[np.int8]
    action: NDArray[np.int8]
    escalated: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PerturbedColumns:
    """Results of perturbed images, as columns of equal length."""

    rows: NDArray[np.int64]
    """Indexes of the judged rows."""
    predicted: NDArray[np.int8]
    score: Floats
    action: NDArray[np.int8]


class ResultColumns:
    """The results of the rows that were judged so far."""

    def __init__(self) -> None:
        self.names: list[str] = [*CATEGORIES, NO_CATEGORY]
        self.failures: Counter[str] = Counter()
        """Rows that could not be judged, by reason."""
        self.examples: list[tuple[str, str, str]] = []
        """Id, reason and sentence of the first rows that could not be judged."""
        self.models: dict[ModelIdentity, None] = {}
        self.calibrations: dict[str, None] = {}
        self._labels = {
            name: array(kind) for name, kind in (("expected", "b"), ("category", "h"), ("waiver_kind", "b"))
        }
        self._predicted = _AnswerColumns()
        self._predicted_category, self._image = array("h"), array("q")
        self._latency = {step: array("f") for step in STEPS}
        self._adaptive = _AnswerColumns()
        self._escalated = array("b")
        self._perturbed: dict[str, _AnswerColumns] = {}

    @property
    def judged(self) -> int:
        """How many rows were judged."""
        return len(self._image)

    def fail(self, row_id: str, reason: str, detail: str) -> None:
        """Count a row that could not be judged."""
        self.failures[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((row_id, reason, detail))

    def add(self, labelled: LabelledImage, waiver_kind: int, category: str | None, verdict: Verdict) -> int:
        """Add a judged row. Returns its index."""
        index = self.judged
        self._labels["expected"].append(labelled.rating == "Unsafe")
        self._labels["category"].append(self._category_index(category))
        self._labels["waiver_kind"].append(waiver_kind)
        self._predicted.add(index, verdict)
        self._predicted_category.append(self._category_index(verdict.category))
        self._image.append(_image_number(labelled.image))
        for step, column in self._latency.items():
            column.append(getattr(verdict.timings_ms, step))
        if verdict.model:
            self.models.setdefault(verdict.model.model_copy(update={"prompt": ""}))
        if verdict.calibration:
            self.calibrations.setdefault(verdict.calibration.digest)
        return index

    def add_adaptive(self, index: int, verdict: Verdict) -> None:
        """Add the verdict on a row with effort `adaptive`."""
        self._adaptive.add(index, verdict)
        self._escalated.append(verdict.effort == "full")

    def add_perturbed(self, index: int, perturbation: str, verdict: Verdict) -> None:
        """Add the verdict on a row's image after a perturbation."""
        self._perturbed.setdefault(perturbation, _AnswerColumns()).add(index, verdict)

    def rows(self) -> JudgedRows:
        """All judged rows."""
        _, image = np.unique(np.array(self._image, np.int64), return_inverse=True)
        return JudgedRows(
            expected=np.array(self._labels["expected"], np.bool_),
            predicted=np.array(self._predicted.predicted, np.int8),
            score=np.array(self._predicted.score, np.float64),
            category=np.array(self._labels["category"], np.int16),
            predicted_category=np.array(self._predicted_category, np.int16),
            waiver_kind=np.array(self._labels["waiver_kind"], np.int8),
            image=image.astype(np.int64),
        )

    def actions(self) -> NDArray[np.int8]:
        """The actions of all judged rows: 0 allow, 1 review, 2 block."""
        return np.array(self._predicted.action, np.int8)

    def latency(self, step: str) -> Floats:
        """The milliseconds of a step, for each judged row."""
        return np.array(self._latency[step], np.float64)

    def adaptive(self) -> AdaptiveColumns:
        """The results with effort `adaptive`."""
        rows, predicted, _, action = self._adaptive.columns()
        return AdaptiveColumns(rows, predicted, action, np.array(self._escalated, np.bool_))

    def perturbed(self) -> dict[str, PerturbedColumns]:
        """The results of perturbed images, by perturbation."""
        return {name: PerturbedColumns(*answers.columns()) for name, answers in self._perturbed.items()}

    def _category_index(self, category: str | None) -> int:
        if category is None:
            return -1
        if category not in self.names:
            self.names.append(category)
        return self.names.index(category)


class _AnswerColumns:
    """Verdicts, with the indexes of their rows."""

    def __init__(self) -> None:
        self.index, self.predicted, self.score, self.action = array("q"), array("b"), array("d"), array("b")

    def add(self, index: int, verdict: Verdict) -> None:
        self.index.append(index)
        self.predicted.append(_predicted(verdict))
        self.score.append(_NAN if verdict.score is None else verdict.score)
        self.action.append(_ACTIONS.index(verdict.action or "review"))

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.int8], Floats, NDArray[np.int8]]:
        return (
            np.array(self.index, np.int64),
            np.array(self.predicted, np.int8),
            np.array(self.score, np.float64),
            np.array(self.action, np.int8),
        )


def _predicted(verdict: Verdict) -> int:
    """SAFE, UNSAFE, or UNREADABLE if the answer was unreadable."""
    if verdict.rating is None:
        return UNREADABLE
    return UNSAFE if verdict.rating == "Unsafe" else SAFE


def _image_number(image: Image) -> int:
    """A 64-bit hash of an image. Two of a million images collide once in 37 million runs."""
    data = image if isinstance(image, bytes) else str(image).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)
