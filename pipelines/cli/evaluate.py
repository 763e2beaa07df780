"""`sluice evaluate` and `sluice calibrate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.output import print_json, print_line, print_lines, print_progress
from pipelines.cli.user import check_reason, find_user_name
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.values import DEFAULT_POLICY

# These commands load Ray, SciPy and Matplotlib; the other commands need not wait for them.
# ruff: noqa: PLC0415

_SETTINGS = ("policy_bucket", "ray_address")

DataSet = Annotated[Path, typer.Argument(metavar="DATASET", help="A .jsonl, .json or .parquet file, or a folder.")]
PolicyOption = Annotated[
    str, typer.Option(metavar="NAME[@V]|FILE", help="The policy to judge by, or a document in YAML.")
]
Split = Annotated[str | None, typer.Option(help="The split to read from a folder that has several, such as test.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Read only the first N rows.")]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Send local files below this folder only, and allow links to it. Default: the folder of the data set.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def evaluate(
    data_set: DataSet,
    policy: PolicyOption = DEFAULT_POLICY,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write evaluation.html, evaluation.json and rows.jsonl to this folder."),
    ] = None,
    split: Split = None,
    limit: Limit = None,
    root: Root = None,
    adaptive: Annotated[
        bool, typer.Option(help="Also judge every row with effort adaptive, at the cost of a second request per row.")
    ] = True,
    robustness: Annotated[bool, typer.Option("--robustness", help="Also judge perturbed images.")] = False,
    robustness_images: Annotated[int, typer.Option(min=1, metavar="N", help="The number of images to perturb.")] = 200,
    prevalence: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The expected share of Unsafe images, to estimate the review load."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=200, help="The number of bootstrap resamples.")] = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge labelled images on the running service and report the accuracy. The command publishes no verdicts."""
    from pipelines.evaluation.data_set_judge import EvaluationOptions
    from pipelines.evaluation.run import PAGE_NAME, DataSetSource
    from pipelines.evaluation.run import evaluate as evaluate_policy

    report = evaluate_policy(
        DataSetSource(data_set, split, limit, root),
        policy,
        settings_module.load(*_SETTINGS),
        options=EvaluationOptions(adaptive=adaptive, perturbed=robustness_images if robustness else 0, seed=seed),
        out=out,
        resamples=resamples,
        prevalence=prevalence,
        progress=print_progress,
    )
    if as_json:
        print_json(report.model_dump_json())
    else:
        print_lines(report.lines())
    if out:
        print_progress(f"the report is in {out / PAGE_NAME}")


def calibrate(
    data_set: Annotated[
        Path | None, typer.Argument(metavar="DATASET", help="Labelled images, as for `sluice evaluate`.")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME[@V]", help="The version whose scores are calibrated.")] = (
        DEFAULT_POLICY
    ),
    apply: Annotated[
        bool, typer.Option("--apply", help="Store the calibration and apply it to scores from now on.")
    ] = False,
    revert: Annotated[
        bool, typer.Option("--revert", help="Apply the previous calibration, or none. Takes no data set.")
    ] = False,
    take_back: Annotated[bool, typer.Option("--take-back", hidden=True, help="The former name of --revert.")] = False,
    method: Annotated[
        Literal["isotonic", "platt"] | None, typer.Option(help="Default: chosen by the number of samples.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="With --revert: the checkpoint, if there are several.")] = (None),
    split: Split = None,
    limit: Limit = None,
    root: Root = None,
    seed: Seed = 0,
    why: Annotated[str, typer.Option("--why", help="The reason, for the history.")] = "",
    who: Annotated[
        str | None, typer.Option("--who", help="The author, for the history. Default: your user name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a calibration, which turns scores into probabilities, on labelled images. Report which actions would change.

    Only --apply stores the calibration. From then on every process applies it to the scores of that policy version
    and checkpoint, so the thresholds have another meaning: check the actions that change first.
    """
    if (revert or take_back) and (data_set or apply):
        raise ConfigurationError("--revert takes no data set and no --apply; omit them")
    check_reason(why)
    from pipelines.evaluation.run import DataSetSource, revert_calibration, store_calibration
    from pipelines.evaluation.run import calibrate as fit_calibration

    by = who or find_user_name()
    if revert or take_back:
        change = revert_calibration(
            policy, revision, settings_module.load("policy_bucket"), who=by, why=why, warn=print_progress
        )
        if as_json:
            print_json(change.model_dump_json(by_alias=True))
        else:
            print_line(f"{change.name}: calibration reverted by {by}")
        return
    if data_set is None:
        raise ConfigurationError("a data set is missing; name one with labelled images, or give --revert")
    settings = settings_module.load(*_SETTINGS)
    fitted = fit_calibration(
        DataSetSource(data_set, split, limit, root), policy, settings, method=method, seed=seed, progress=print_progress
    )
    if as_json:
        print_json(fitted.to_json(applied=apply))
    else:
        print_lines(fitted.lines())
    if not apply:
        print_progress("the calibration is not stored; --apply stores and applies it, and --revert undoes that")
        return
    store_calibration(fitted, settings, who=by, why=why, warn=print_progress)
    print_progress(f"applied to the scores of {fitted.evaluated.name} by the checkpoint {fitted.revision}")
