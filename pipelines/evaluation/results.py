"""What was judged so far, as columns: some 80 bytes a row, so that a million rows fit into any memory."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.bootstrap import Floats
from pipelines.evaluation.labels import Image, LabelledImage
from pipelines.evaluation.metrics import INVALID, SAFE, UNSAFE, Judged
from services.core.messages import Verdict
from services.core.values import CATEGORIES, NO_CATEGORY, ModelIdentity

STEPS: Final = ("fetch", "prepare", "guard", "total")
_EXAMPLES: Final = 20
_NAN: Final = float("nan")
_ACTIONS: Final = ("allow", "review", "block")


@dataclass(frozen=True, slots=True)
class AdaptiveColumns:
    """Rows that were judged with effort `adaptive` too; all of equal length."""

    rows: NDArray[np.int64]
    """Places among the judged rows."""
    predicted: NDArray[np.int8]
    action: NDArray[np.int8]
    escalated: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PerturbedColumns:
    """Images that were judged perturbed too; all of equal length."""

    rows: NDArray[np.int64]
    """Places among the judged rows."""
    predicted: NDArray[np.int8]
    score: Floats
    action: NDArray[np.int8]


class Columns:
    """Collects rows."""

    def __init__(self) -> None:
        self.names: list[str] = [*CATEGORIES, NO_CATEGORY]
        self.failures: Counter[str] = Counter()
        """Rows that could not be judged, by reason."""
        self.examples: list[tuple[str, str, str]] = []
        """Id, reason and sentence of the first ones."""
        self.models: dict[ModelIdentity, None] = {}
        self.calibrations: dict[str, None] = {}
        self._labels = {name: array(kind) for name, kind in (("expected", "b"), ("category", "h"), ("kind", "b"))}
        self._predicted = _Answers()
        self._predicted_category, self._image = array("h"), array("q")
        self._latency = {step: array("f") for step in STEPS}
        self._adaptive = _Answers()
        self._escalated = array("b")
        self._perturbed: dict[str, _Answers] = {}

    @property
    def judged(self) -> int:
        """How many rows were judged."""
        return len(self._image)

    def fail(self, name: str, reason: str, detail: str) -> None:
        """Count a row that could not be judged."""
        self.failures[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((name, reason, detail))

    def add(self, sample: LabelledImage, kind: int, category: str | None, verdict: Verdict) -> int:
        """Keep a judged row; its place."""
        place = self.judged
        self._labels["expected"].append(sample.rating == "Unsafe")
        self._labels["category"].append(self._place_of(category))
        self._labels["kind"].append(kind)
        self._predicted.add(place, verdict)
        self._predicted_category.append(self._place_of(verdict.category))
        self._image.append(_number_of(sample.image))
        for step, column in self._latency.items():
            column.append(getattr(verdict.timings_ms, step))
        if verdict.model:
            self.models.setdefault(verdict.model.model_copy(update={"prompt": ""}))
        if verdict.calibration:
            self.calibrations.setdefault(verdict.calibration.digest)
        return place

    def add_adaptive(self, place: int, verdict: Verdict) -> None:
        """Keep what was said of a row with effort `adaptive`."""
        self._adaptive.add(place, verdict)
        self._escalated.append(verdict.effort == "full")

    def add_perturbed(self, place: int, perturbation: str, verdict: Verdict) -> None:
        """Keep what was said of a row's image after a perturbation."""
        self._perturbed.setdefault(perturbation, _Answers()).add(place, verdict)

    def rows(self) -> Judged:
        """All judged rows."""
        _, image = np.unique(np.array(self._image, np.int64), return_inverse=True)
        return Judged(
            expected=np.array(self._labels["expected"], np.bool_),
            predicted=np.array(self._predicted.predicted, np.int8),
            score=np.array(self._predicted.score, np.float64),
            category=np.array(self._labels["category"], np.int16),
            predicted_category=np.array(self._predicted_category, np.int16),
            kind=np.array(self._labels["kind"], np.int8),
            image=image.astype(np.int64),
        )

    def actions(self) -> NDArray[np.int8]:
        """The actions of all judged rows, as places in allow, review, block."""
        return np.array(self._predicted.action, np.int8)

    def latency(self, step: str) -> Floats:
        """Milliseconds that each judged row spent in a step."""
        return np.array(self._latency[step], np.float64)

    def adaptive(self) -> AdaptiveColumns:
        rows, predicted, _, action = self._adaptive.columns()
        return AdaptiveColumns(rows, predicted, action, np.array(self._escalated, np.bool_))

    def perturbed(self) -> dict[str, PerturbedColumns]:
        """By perturbation."""
        return {name: PerturbedColumns(*answers.columns()) for name, answers in self._perturbed.items()}

    def _place_of(self, category: str | None) -> int:
        if category is None:
            return -1
        if category not in self.names:
            self.names.append(category)
        return self.names.index(category)


class _Answers:
    """Some verdicts, and the places of the rows that they are about."""

    def __init__(self) -> None:
        self.place, self.predicted, self.score, self.action = array("q"), array("b"), array("d"), array("b")

    def add(self, place: int, verdict: Verdict) -> None:
        self.place.append(place)
        self.predicted.append(predicted(verdict))
        self.score.append(_NAN if verdict.score is None else verdict.score)
        self.action.append(_ACTIONS.index(verdict.action or "review"))

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.int8], Floats, NDArray[np.int8]]:
        return (
            np.array(self.place, np.int64),
            np.array(self.predicted, np.int8),
            np.array(self.score, np.float64),
            np.array(self.action, np.int8),
        )


def predicted(verdict: Verdict) -> int:
    """SAFE, UNSAFE, or INVALID where the answer could not be read."""
    if verdict.rating is None:
        return INVALID
    return UNSAFE if verdict.rating == "Unsafe" else SAFE


def _number_of(image: Image) -> int:
    """The same for the same image; 64 bits, so that among a million two are the same once in 37 million runs."""
    data = image if isinstance(image, bytes) else str(image).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)
