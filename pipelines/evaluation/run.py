"""Runs an evaluation or fits a calibration: from the data set to the report or the stored calibration."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipelines.clients.judge_client import Progress, open_client
from pipelines.clients.policy_changes import change_policy
from pipelines.evaluation.calibration_fit import ActionChanges, CalibrationFit, Method, count_changes, fit_calibration
from pipelines.evaluation.data_set_judge import DataSetJudge, EvaluationOptions
from pipelines.evaluation.datasets import DataSet, open_data_set
from pipelines.evaluation.html import render_page
from pipelines.evaluation.labels import LabelledImage
from pipelines.evaluation.policy_selection import EvaluatedPolicy, PolicySelector, find_policy, find_published
from pipelines.evaluation.report import EvaluationReport, build_report
from pipelines.evaluation.results import ResultColumns
from services.core.calibration import StoredCalibration
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.policies.registry import PolicyRegistry
from services.policies.rollout import RolloutChange

PAGE_NAME: Final = "evaluation.html"
REPORT_NAME: Final = "evaluation.json"
ROWS_NAME: Final = "rows.jsonl"
_EXAMPLES_SHOWN: Final = 3
_END: Final = object()


@dataclass(frozen=True, slots=True)
class DataSetSource:
    """A data set, and the rows of it to use."""

    path: Path
    split: str | None = None
    limit: int | None = None
    root: Path | None = None
    """The folder whose files the data set may name. Default: its own. Links in the data set may point into it, too."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """A `CalibrationFit` of one policy version and checkpoint, and the actions that it would change. Not stored yet."""

    evaluated: EvaluatedPolicy
    revision: str
    """The revision of the checkpoint whose scores it maps."""
    fit: CalibrationFit
    changes: ActionChanges
    failures: dict[str, int]
    left_out: int
    """Rows that waive categories or name another policy."""

    def to_store(self) -> StoredCalibration:
        """The form that the policy bucket stores."""
        return StoredCalibration(
            version=self.evaluated.version,
            revision=self.revision,
            map=self.fit.map,
            samples=self.fit.samples,
            unsafe=self.fit.unsafe,
            ece_before=self.fit.ece_before,
            ece_after=self.fit.ece_after,
        )

    def lines(self) -> list[str]:
        """The fit and its effects for people."""
        fit, changes = self.fit, self.changes
        lines = [
            f"{self.evaluated.name}, checkpoint {self.revision}: {fit.map.method} over {fit.samples:,} samples "
            f"({fit.unsafe:,} Unsafe)",
            f"calibration error {fit.ece_before:.3f} to {fit.ece_after:.3f}, Brier score {fit.brier_before:.3f} to "
            f"{fit.brier_after:.3f}, each on images that the map was not fitted on",
            f"actions that would change: {changes.changed:,} of {fit.samples:,}",
        ]
        lines += [f"  {before} to {after}: {n:,}" for (before, after), n in changes.rows.items() if before != after]
        for name, (before, after) in (
            ("Unsafe and allowed", changes.unsafe_allowed),
            ("Safe and blocked", changes.safe_blocked),
            ("Safe and reviewed", changes.safe_reviewed),
        ):
            lines.append(f"{name}: {before:,} before, {after:,} after")
        if self.left_out:
            lines.append(f"left out: {self.left_out:,} rows that waive categories or name another policy")
        if self.failures:
            lines.append("not judged: " + ", ".join(f"{reason} {count:,}" for reason, count in self.failures.items()))
        return lines

    def to_json(self, *, applied: bool) -> str:
        """The same as one JSON object; `applied` says whether the calibration is stored."""
        fit, changes = self.fit, self.changes
        return json.dumps(
            {
                "policy": {"name": self.evaluated.document.name, "version": self.evaluated.version},
                "revision": self.revision,
                "digest": fit.map.digest,
                "map": fit.map.model_dump(mode="json"),
                "samples": fit.samples,
                "unsafe": fit.unsafe,
                "ece": {"before": fit.ece_before, "after": fit.ece_after},
                "brier": {"before": fit.brier_before, "after": fit.brier_after},
                "actions": [{"before": a, "after": b, "rows": n} for (a, b), n in changes.rows.items()],
                "unsafe_allowed": changes.unsafe_allowed,
                "safe_blocked": changes.safe_blocked,
                "safe_reviewed": changes.safe_reviewed,
                "left_out": self.left_out,
                "failures": self.failures,
                "applied": applied,
            }
        )


def evaluate(
    source: DataSetSource,
    policy: str,
    settings: Settings,
    *,
    options: EvaluationOptions,
    out: Path | None,
    resamples: int,
    prevalence: float | None,
    progress: Progress,
) -> EvaluationReport:
    """Judge a labelled data set on the running service. The page, the figures and the rows are written to `out`.

    Raises:
        ConfigurationError: no service runs, there is no data set or policy, or none of its rows could be judged.
        SluiceError: the service or the bucket failed.
    """
    evaluated = find_policy(policy, PolicyRegistry.from_settings(settings))
    data_set, records = _open_source(source)
    with ExitStack() as stack:
        write = stack.enter_context(_RowsFile(_make_folder(out) / ROWS_NAME)) if out else _discard
        columns = _judge_data_set(source, data_set, records, evaluated, settings, options, write, progress).columns
    progress("computing the figures")
    thresholds = evaluated.document.thresholds
    report = build_report(
        columns,
        data_set=data_set.name,
        policy=evaluated.name,
        policy_thresholds=(thresholds.review, thresholds.block),
        seed=options.seed,
        resamples=resamples,
        prevalence=prevalence,
    )
    if out:
        (out / REPORT_NAME).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (out / PAGE_NAME).write_text(render_page(report), encoding="utf-8")
    return report


def calibrate(
    source: DataSetSource, policy: str, settings: Settings, *, method: Method | None, seed: int, progress: Progress
) -> CalibrationResult:
    """Fit a calibration of a published version on a labelled data set. Rows with other policies are left out.

    Raises:
        ConfigurationError: as `evaluate`, or no calibration can be fitted on the judged rows.
        SluiceError: the service or the bucket failed.
    """
    evaluated = find_policy(policy, PolicyRegistry.from_settings(settings))
    if not evaluated.version:
        raise ConfigurationError(
            f"{policy} is not published, and a calibration belongs to a published version; publish the policy first"
        )
    raw = replace(evaluated, calibrations={})
    data_set, records = _open_source(source)
    judging = _judge_data_set(
        source, data_set, records, raw, settings, EvaluationOptions(), _discard, progress, keep=_has_plain_policy
    )
    columns = judging.columns
    revisions = {model.revision for model in columns.models}
    if len(revisions) != 1:
        raise ConfigurationError("the service changed its checkpoint during the run; run the command again")
    rows = columns.rows()
    rows = rows.where(np.isfinite(rows.score))
    unsafe = rows.expected.astype(np.float64)
    fitted = fit_calibration(unsafe, rows.score, rows.image, method=method, seed=seed)
    categories = [columns.names[index] if index >= 0 else None for index in rows.predicted_category]
    return CalibrationResult(
        evaluated=evaluated,
        revision=revisions.pop(),
        fit=fitted,
        changes=count_changes(unsafe, rows.score, categories, fitted.map, raw.document.as_version(raw.version)),
        failures=dict(columns.failures.most_common()),
        left_out=judging.left_out,
    )


def store_calibration(
    fitted: CalibrationResult, settings: Settings, *, who: str, why: str, warn: Callable[[str], object]
) -> RolloutChange:
    """Store a calibration. From then on every process applies it to the scores of its version and checkpoint."""
    name = fitted.evaluated.document.name
    return change_policy(
        settings, lambda service: service.calibrate(name, fitted.to_store(), who=who, why=why), warn=warn
    )


def revert_calibration(
    policy: str, revision: str | None, settings: Settings, *, who: str, why: str, warn: Callable[[str], object]
) -> RolloutChange:
    """Apply the calibration that was applied before the present one, or none. `revision` names a checkpoint.

    Raises:
        UnknownPolicy: there is no such version.
        ConfigurationError: the version has no calibration, or it has several and `revision` is missing.
    """
    evaluated = find_published(policy, PolicyRegistry.from_settings(settings))
    revisions = [revision] if revision else sorted(evaluated.calibrations)
    if not revisions:
        raise ConfigurationError(f"{evaluated.name} has no calibration, so there is none to revert")
    if len(revisions) > 1:
        raise ConfigurationError(
            f"{evaluated.name} has calibrations of several checkpoints ({', '.join(revisions)}); give --revision"
        )
    name, version = evaluated.document.name, evaluated.version
    return change_policy(
        settings,
        lambda service: service.revert_calibration(name, version, revisions[0], who=who, why=why),
        warn=warn,
    )


def _has_plain_policy(labelled: LabelledImage) -> bool:
    return labelled.policy is None and not labelled.waived


def _discard(_row: dict[str, Any]) -> None:
    pass


class _RowsFile:
    """A file with a line for each row, written while the rows are judged."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._output = self._file.open("w", encoding="utf-8")
        return lambda row: print(json.dumps(row), file=self._output)

    def __exit__(self, *_: object) -> None:
        self._output.close()


def _make_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ROWS_NAME).touch()
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error.strerror}; name another folder with --out") from None
    return out


def _open_source(source: DataSetSource) -> tuple[DataSet, Iterator[Any]]:
    """The data set and its records. Raises ConfigurationError if there is no record."""
    data_set = open_data_set(source.path, source.split, source.root)
    records = data_set.records()
    first = next(records, _END)
    if first is _END:
        raise ConfigurationError(f"{source.path} has no rows; name another data set")
    return data_set, islice(chain([first], records), source.limit)


def _judge_data_set(
    source: DataSetSource,
    data_set: DataSet,
    records: Iterable[Any],
    evaluated: EvaluatedPolicy,
    settings: Settings,
    options: EvaluationOptions,
    write: Callable[[dict[str, Any]], None],
    progress: Progress,
    keep: Callable[[LabelledImage], bool] = lambda _labelled: True,
) -> DataSetJudge:
    total = data_set.count()
    if total is not None:
        total = int(min(total, source.limit or math.inf))
    with open_client(settings) as service:
        progress(f"judging {data_set.name} under {evaluated.name}")
        selector = PolicySelector(evaluated, PolicyRegistry.from_settings(settings))
        judging = DataSetJudge(service, selector, settings, options, keep=keep, write=write, root=source.root)
        columns = judging.run(records, data_set.folder, total, progress)
    if not columns.judged:
        raise ConfigurationError(_no_rows_message(data_set, columns, judging.left_out))
    return judging


def _no_rows_message(data_set: DataSet, columns: ResultColumns, left_out: int) -> str:
    if not columns.failures:
        return (
            f"{data_set.name} has no row for the policy itself: all {left_out:,} rows waive categories or name another "
            "policy"
        )
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in columns.failures.most_common())
    shown = "; ".join(f"{name} {detail}" for name, _, detail in columns.examples[:_EXAMPLES_SHOWN])
    return f"no row of {data_set.name} could be judged ({reasons}): {shown}"
