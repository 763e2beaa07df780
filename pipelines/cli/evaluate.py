"""`sluice evaluate` and `sluice calibrate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.cli.output import print_progress
from pipelines.cli.policy_service import change_policy
from pipelines.reporting.text import user
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.values import DEFAULT_POLICY
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Change

if TYPE_CHECKING:
    from pipelines.evaluation.run import CalibrationResult

# What judges and computes takes Ray, SciPy and Matplotlib; the other commands need not wait for them.
# ruff: noqa: PLC0415

_SETTINGS = ("policy_bucket", "s3_buckets", "ray_address")

DataSet = Annotated[Path, typer.Argument(metavar="DATASET", help="A .jsonl, .json or .parquet file, or a folder.")]
PolicyOption = Annotated[str, typer.Option(metavar="NAME[@V]|FILE", help="What judges; a document in YAML, too.")]
Split = Annotated[str | None, typer.Option(help="Of a folder that has several, such as test.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="The first rows only.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed draws the same resamples, noise and folds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")]


def evaluate(
    data_set: DataSet,
    policy: PolicyOption = DEFAULT_POLICY,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Gets evaluation.html, evaluation.json and rows.jsonl.")
    ] = None,
    split: Split = None,
    limit: Limit = None,
    adaptive: Annotated[bool, typer.Option(help="Judge every row with effort adaptive, too.")] = True,
    robustness: Annotated[bool, typer.Option("--robustness", help="Judge perturbed images, too.")] = False,
    robustness_images: Annotated[int, typer.Option(min=1, metavar="N", help="So many of them.")] = 200,
    prevalence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of Unsafe images to expect, for the review load.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=200, help="Of the bootstrap.")] = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a labelled data set on the running service, and say how well. Nothing is published or acted upon."""
    from pipelines.evaluation import run as runs
    from pipelines.evaluation.sample_judge import EvaluationOptions

    report = runs.evaluate(
        runs.DataSetSource(data_set, split, limit),
        policy,
        settings_module.load(*_SETTINGS),
        options=EvaluationOptions(adaptive=adaptive, perturbed=robustness_images if robustness else 0, seed=seed),
        out=out,
        resamples=resamples,
        prevalence=prevalence,
        progress=print_progress,
    )
    typer.echo(report.model_dump_json() if as_json else "\n".join(report.lines()))
    if out:
        print_progress(f"{out / runs.PAGE} shows it")


def calibrate(
    data_set: Annotated[
        Path | None, typer.Argument(metavar="DATASET", help="Labelled images, as for `sluice evaluate`.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME[@V]", help="The version whose scores it is about.")] = (
        DEFAULT_POLICY
    ),
    apply: Annotated[bool, typer.Option("--apply", help="Store it, and apply it to scores from now on.")] = False,
    revert: Annotated[
        bool, typer.Option("--revert", help="Apply the calibration before this one, or none; takes no data set.")
    ] = False,
    take_back: Annotated[bool, typer.Option("--take-back", hidden=True, help="The former name of --revert.")] = False,
    method: Annotated[
        Literal["isotonic", "platt"] | None, typer.Option(help="By the number of samples unless given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="With --revert: of the checkpoint, if there are several.")] = (
        None
    ),
    split: Split = None,
    limit: Limit = None,
    seed: Seed = 0,
    why: Annotated[str, typer.Option("--why", help="Kept in the history.")] = "",
    who: Annotated[str | None, typer.Option("--who", help="Kept in the history; your user name unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit what makes a probability of the score, on labelled images, and say which actions would change.

    Only with --apply anything is stored: from then on every process applies it to the scores of that policy version
    and checkpoint, so thresholds mean something else.
    """
    by = who or user()
    if revert or take_back:
        if data_set or apply:
            raise ConfigurationError("--revert takes no data set and no --apply; leave them out")
        change = _revert_calibration(policy, revision, by, why)
        typer.echo(change.model_dump_json(by_alias=True) if as_json else f"{change.name}: taken back by {by}")
        return
    if data_set is None:
        raise ConfigurationError("a data set is missing; name one with labelled images, or give --revert")
    from pipelines.evaluation import run as runs

    settings = settings_module.load(*_SETTINGS)
    fitted = runs.calibrate(
        runs.DataSetSource(data_set, split, limit), policy, settings, method=method, seed=seed, progress=print_progress
    )
    typer.echo(json.dumps(_as_json(fitted, apply)) if as_json else "\n".join(_lines(fitted)))
    if not apply:
        print_progress("nothing is stored; --apply applies it from now on, and --revert undoes that")
        return
    name = fitted.evaluated.document.name
    change_policy(settings, lambda service: service.calibrate(name, fitted.to_store(), who=by, why=why))
    print_progress(f"applied to the scores of {fitted.evaluated.name} by the checkpoint {fitted.revision}")


def _revert_calibration(policy: str, revision: str | None, by: str, why: str) -> Change:
    from pipelines.evaluation.policies import published

    settings = settings_module.load("policy_bucket")
    registry = PolicyRegistry.from_settings(settings)
    evaluated = published(policy, registry)
    revisions = [revision] if revision else sorted(evaluated.calibrations)
    if len(revisions) != 1:
        found = f"those of the checkpoints {', '.join(revisions)}; name one by --revision" if revisions else "none"
        raise ConfigurationError(f"{evaluated.name} has several calibrations, or none: {found}")
    name = evaluated.document.name
    return change_policy(
        settings,
        lambda service: service.revert_calibration(name, evaluated.version, revisions[0], who=by, why=why),
    )


def _lines(fitted: "CalibrationResult") -> list[str]:
    fit, changes = fitted.fit, fitted.changes
    lines = [
        f"{fitted.evaluated.name}, checkpoint {fitted.revision}: {fit.map.method} over {fit.samples:,} samples "
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
    if fitted.left_out:
        lines.append(f"left out: {fitted.left_out:,} rows that waive categories or name another policy")
    if fitted.failures:
        lines.append("not judged: " + ", ".join(f"{reason} {count:,}" for reason, count in fitted.failures.items()))
    return lines


def _as_json(fitted: "CalibrationResult", applied: bool) -> dict[str, object]:
    fit, changes = fitted.fit, fitted.changes
    return {
        "policy": {"name": fitted.evaluated.document.name, "version": fitted.evaluated.version},
        "revision": fitted.revision,
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
        "left_out": fitted.left_out,
        "failures": fitted.failures,
        "applied": applied,
    }
