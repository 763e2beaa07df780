"""`sluice policy`: write, test, roll out and roll back policy versions."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.output import print_json, print_line, print_lines, print_progress, print_yaml, write_file
from pipelines.cli.user import find_user_name
from pipelines.clients.policy_changes import change_policy
from services.core import settings as settings_module
from services.core.errors import ConfigurationError, SluiceError
from services.core.settings import Settings
from services.policies.comparison import diff_versions
from services.policies.document import PolicyDocument
from services.policies.document_warnings import find_warnings
from services.policies.document_yaml import read_document_file, write_document
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Canary, RolloutChange, Shadow
from services.policies.service import PolicyService
from services.policies.tenants import Document

app = typer.Typer(help="Write, test, roll out and roll back policy versions.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy document in YAML.")]
Version = Annotated[str, typer.Argument(metavar="NAME@V")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Why = Annotated[str, typer.Option("--why", help="The reason, for the history.")]
Who = Annotated[str | None, typer.Option("--who", help="The author, for the history. Default: your user name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


def _make_limit_option(meaning: str) -> Any:
    """The option for a limit of a backtest."""
    return typer.Option(min=0, max=1, metavar="SHARE", help=meaning)


@app.command()
def check(
    file: File,
    examples: Annotated[
        bool, typer.Option("--examples", help="Also judge the document's examples on the running service.")
    ] = False,
) -> None:
    """Report errors in a policy document, and warn of rules that the model was not trained for."""
    document = _read_document(file)
    if examples:
        from pipelines.policy_testing.examples import run_examples  # noqa: PLC0415 - it loads Ray

        if not isinstance(document, PolicyDocument):
            raise ConfigurationError(f"{file} is not a policy, so it has no examples; omit --examples")
        settings = settings_module.load("ray_address")
        failed = run_examples(document, file.parent, settings, write=print_line, progress=print_progress)
        if failed:
            raise SluiceError(f"{failed} of {len(document.examples)} examples did not come out as expected")
    print_line(f"{file}: {document.name} is valid")


@app.command()
def publish(file: File, as_json: AsJson = False) -> None:
    """Write a document as the next version of its name. The version is not active yet."""
    document = _read_document(file)
    stored = change_policy(_load_settings(), lambda service: service.publish(document), warn=print_progress)
    identity = {"name": stored.name, "version": stored.version, "digest": stored.digest}
    if as_json:
        print_json(json.dumps(identity))
    else:
        print_line(f"{stored.name}@{stored.version} {stored.digest}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the policies with their active version, canary and shadow."""
    registry = PolicyRegistry.from_settings(_load_settings())
    for name in registry.list_names():
        summary = registry.summarize(name)
        if as_json:
            print_json(json.dumps(summary.model_dump()))
        else:
            print_line(summary.line())


@app.command()
def show(policy: Annotated[str, typer.Argument(metavar="NAME[@V]")]) -> None:
    """Print a version as YAML that `publish` accepts. Default: the active version."""
    stored = PolicyRegistry.from_settings(_load_settings()).find(PolicyReference.parse(policy))
    print_yaml(write_document(stored.document, version=stored.version, digest=stored.digest))


@app.command()
def activate(policy: Version, why: Why = "", who: Who = None, as_json: AsJson = False) -> None:
    """Judge new submissions by this version. A canary ends, and an open circuit breaker closes."""
    name, version = PolicyReference.parse(policy).require_version()
    _change(lambda service, by: service.activate(name, version, who=by, why=why), who, as_json)


@app.command()
def rollback(policy: Name, why: Why = "", who: Who = None, as_json: AsJson = False) -> None:
    """Activate the version that was active before. A repetition goes further back.

    If the circuit breaker of that version is open, it stays open.
    """
    _change(lambda service, by: service.rollback(_parse_name(policy), who=by, why=why), who, as_json)


@app.command()
def canary(
    policy: Annotated[str, typer.Argument(metavar="NAME[@V]", help="NAME without a version ends the canary.")],
    percent: Annotated[
        float, typer.Option(min=0, max=100, help="Share of the submissions, chosen by a hash of their ids.")
    ] = 0,
    tenant: Annotated[
        list[str] | None, typer.Option(help="A tenant all of whose submissions are judged by it. Can be repeated.")
    ] = None,
    why: Why = "",
    who: Who = None,
    as_json: AsJson = False,
) -> None:
    """Judge a share of the submissions by another version, change the share, or end the canary."""
    reference = PolicyReference.parse(policy)
    name, version = reference.name, reference.version
    chosen = None
    if version is not None:
        if not percent and not tenant:
            raise ConfigurationError("a canary needs --percent or --tenant; NAME without a version ends it")
        chosen = Canary(version=version, percent=percent, tenants=frozenset(tenant or ()))
    _change(lambda service, by: service.set_canary(name, chosen, who=by, why=why), who, as_json)


@app.command()
def shadow(
    policy: Annotated[str, typer.Argument(metavar="NAME[@V]", help="NAME without a version ends the shadow.")],
    percent: Annotated[float, typer.Option(min=0.001, max=100, help="Share of the submissions.")] = 100,
    why: Why = "",
    who: Who = None,
    as_json: AsJson = False,
) -> None:
    """Also judge submissions by another version, for comparison only, or end the shadow."""
    reference = PolicyReference.parse(policy)
    name, version = reference.name, reference.version
    chosen = Shadow(version=version, percent=percent) if version is not None else None
    _change(lambda service, by: service.set_shadow(name, chosen, who=by, why=why), who, as_json)


@app.command()
def diff(before: Version, after: Version) -> None:
    """Compare two versions: first the documents, then the prompts that they make."""
    registry = PolicyRegistry.from_settings(_load_settings())
    print_lines(diff_versions(PolicyReference.parse(before), PolicyReference.parse(after), registry))


@app.command()
def backtest(
    policy: Version,
    against: Annotated[str, typer.Option(metavar="NAME@V", help="The version to compare with.")],
    sample: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Judge at most N submissions, drawn at random from the traffic sample. Recent ones are more likely.",
        ),
    ] = 1000,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the images whose action changes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    max_block_rate: Annotated[
        float | None, _make_limit_option("Highest share of blocks under the new version.")
    ] = None,
    max_review_rate: Annotated[
        float | None, _make_limit_option("Highest share of reviews under the new version.")
    ] = None,
    max_block_increase: Annotated[
        float | None, _make_limit_option("Highest increase of the share of blocks. 0.01 is one percentage point.")
    ] = None,
    max_review_increase: Annotated[
        float | None, _make_limit_option("Highest increase of the share of reviews. 0.01 is one percentage point.")
    ] = None,
    max_flips: Annotated[
        float | None, _make_limit_option("Highest share of submissions whose action differs between the versions.")
    ] = None,
    max_errors: Annotated[
        float | None, _make_limit_option("Highest share of submissions that cannot be judged under the new version.")
    ] = None,
) -> None:
    """Judge recent submissions by a version and by the version that it would replace, and report the differences.

    The command publishes no verdicts. Live submissions have priority. If a figure is above its --max option, the exit
    status is 1.
    """
    from pipelines.policy_testing.backtest import backtest as run_backtest  # noqa: PLC0415 - it loads SciPy
    from pipelines.policy_testing.backtest_html import render_page  # noqa: PLC0415
    from pipelines.policy_testing.backtest_report import BacktestLimits  # noqa: PLC0415

    limits = BacktestLimits(
        max_block_rate=max_block_rate,
        max_review_rate=max_review_rate,
        max_block_increase=max_block_increase,
        max_review_increase=max_review_increase,
        max_flips=max_flips,
        max_errors=max_errors,
    )
    settings = settings_module.load("policy_bucket", "redis_url", "s3_buckets", "ray_address")
    registry = PolicyRegistry.from_settings(settings)
    for version in (policy, against):
        registry.get(*PolicyReference.parse(version).require_version())
    if html and not html.parent.is_dir():
        raise ConfigurationError(f"{html} cannot be written: there is no folder {html.parent}")
    report, pairs = run_backtest(
        before=against,
        after=policy,
        count=sample,
        pictures=html is not None,
        settings=settings,
        progress=print_progress,
    )
    exceeded = report.exceeded(limits)
    if html:
        write_file(html, render_page(report, pairs, exceeded=exceeded))
    if as_json:
        print_json(json.dumps(report.model_dump(mode="json") | {"exceeded": exceeded}))
    else:
        print_lines(report.lines())
    for sentence in exceeded:
        print_progress(sentence)
    if exceeded:
        raise typer.Exit(1)


@app.command()
def history(policy: Name, as_json: AsJson = False) -> None:
    """Print every change of a policy's rollout, oldest first."""
    for change in PolicyRegistry.from_settings(_load_settings()).list_changes(_parse_name(policy)):
        _print_change(change, as_json)


def _read_document(file: Path) -> Document:
    document = read_document_file(file)
    for warning in find_warnings(document):
        print_progress(f"{file}: warning: {warning}")
    return document


def _load_settings() -> Settings:
    return settings_module.load("policy_bucket")


def _change(change: Callable[[PolicyService, str], Awaitable[RolloutChange]], who: str | None, as_json: bool) -> None:
    done = change_policy(
        _load_settings(), lambda service: change(service, who or find_user_name()), warn=print_progress
    )
    _print_change(done, as_json)


def _print_change(change: RolloutChange, as_json: bool) -> None:
    if as_json:
        print_json(change.history_json())
    else:
        print_line(change.history_line())


def _parse_name(name: str) -> str:
    reference = PolicyReference.parse(name)
    if reference.version is not None:
        raise ConfigurationError(f"{name!r} has a version; write {reference.name} without it")
    return reference.name
