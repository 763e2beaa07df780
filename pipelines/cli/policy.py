"""`sluice policy`: write, try, roll out and take back policy versions."""

import difflib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.policy_service import change_policy
from pipelines.reporting.text import user
from services.core import settings as settings_module
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.policies.document import PolicyDocument
from services.policies.document_yaml import read_document, warnings, write_document
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, Change, Shadow
from services.policies.service import PolicyService

app = typer.Typer(help="Write, try, roll out and take back policy versions.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy document in YAML.")]
Version = Annotated[str, typer.Argument(metavar="NAME@V")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Why = Annotated[str, typer.Option("--why", help="Kept in the history.")]
Who = Annotated[str | None, typer.Option("--who", help="Kept in the history; your user name unless given.")]
Bound = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="SHARE", help="Beyond it the exit status is 1; 0.01 is a percentage point."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command()
def check(
    file: File,
    examples: Annotated[
        bool, typer.Option("--examples", help="Judge the document's examples on the running service, too.")
    ] = False,
) -> None:
    """Say what is wrong with a policy document, and what the model was not trained for."""
    document = _read(file)
    for warning in warnings(document):
        typer.echo(f"{file}: warning: {warning}", err=True)
    if examples:
        from pipelines.policy_testing.examples import run_examples  # noqa: PLC0415 - it takes Ray

        if not isinstance(document, PolicyDocument):
            raise ConfigurationError(f"{file} is no policy, so it has no examples; leave --examples out")
        settings = settings_module.load("ray_address")
        failed = run_examples(document, file.parent, settings, write=typer.echo)
        if failed:
            raise ConfigurationError(f"{failed} of {len(document.examples)} examples did not come out as expected")
    typer.echo(f"{file}: {document.name} is well-formed")


@app.command()
def publish(file: File, as_json: AsJson = False) -> None:
    """Write a document as the next version of its name. It is not active yet."""
    document, settings = _read(file), _settings()
    for warning in warnings(document):
        typer.echo(f"{file}: warning: {warning}", err=True)
    stored = change_policy(settings, lambda service: service.publish(document))
    identity = {"name": stored.name, "version": stored.version, "digest": stored.digest}
    typer.echo(json.dumps(identity) if as_json else f"{stored.name}@{stored.version} {stored.digest}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the policies: versions, the active one, canary and shadow."""
    registry = PolicyRegistry.from_settings(_settings())
    for name in registry.names():
        row = registry.summary(name).model_dump()
        typer.echo(json.dumps(row) if as_json else _row(row))


@app.command()
def show(policy: Annotated[str, typer.Argument(metavar="NAME[@V]")]) -> None:
    """Print a version, the active one unless given, as YAML that `publish` takes."""
    stored = PolicyRegistry.from_settings(_settings()).find(PolicyReference.parse(policy))
    typer.echo(write_document(stored.document, version=stored.version, digest=stored.digest), nl=False)


@app.command()
def activate(policy: Version, why: Why = "", who: Who = None, as_json: AsJson = False) -> None:
    """Make a version the one that new submissions get; a canary ends, an open circuit breaker closes."""
    name, version = PolicyReference.parse(policy).pinned()
    _change(lambda service, by: service.activate(name, version, who=by, why=why), who, as_json)


@app.command()
def rollback(policy: Name, why: Why = "", who: Who = None, as_json: AsJson = False) -> None:
    """Make the version active that was before the present one; again goes further back."""
    _change(lambda service, by: service.rollback(_name(policy), who=by, why=why), who, as_json)


@app.command()
def canary(
    policy: Annotated[str, typer.Argument(metavar="NAME[@V]", help="NAME alone ends the canary.")],
    percent: Annotated[float, typer.Option(min=0, max=100, help="Of the submissions, by a hash of their ids.")] = 0,
    tenant: Annotated[list[str] | None, typer.Option(help="Whose submissions all get it; may be repeated.")] = None,
    why: Why = "",
    who: Who = None,
    as_json: AsJson = False,
) -> None:
    """Give a share of the submissions another version than the active one, up or down, or end that."""
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
    policy: Annotated[str, typer.Argument(metavar="NAME[@V]", help="NAME alone ends the shadow.")],
    percent: Annotated[float, typer.Option(min=0.001, max=100, help="Of the submissions.")] = 100,
    why: Why = "",
    who: Who = None,
    as_json: AsJson = False,
) -> None:
    """Judge submissions by another version as well, for comparison only, or end that."""
    reference = PolicyReference.parse(policy)
    name, version = reference.name, reference.version
    chosen = Shadow(version=version, percent=percent) if version is not None else None
    _change(lambda service, by: service.set_shadow(name, chosen, who=by, why=why), who, as_json)


@app.command()
def diff(before: Version, after: Version) -> None:
    """Compare two versions: the documents, then the prompts that they make."""
    registry = PolicyRegistry.from_settings(_settings())
    old, new = (registry.find(PolicyReference.parse(version)) for version in (before, after))

    def compare(what: str, text: Callable[[StoredVersion], str]) -> None:
        lines = difflib.unified_diff(
            text(old).splitlines(), text(new).splitlines(), f"{before} ({what})", f"{after} ({what})", lineterm=""
        )
        for line in lines:
            typer.echo(line)

    compare("document", lambda stored: write_document(stored.document, version=0, digest=""))
    compare("prompt", lambda stored: stored.document.prompt() if isinstance(stored.document, PolicyDocument) else "")


@app.command()
def backtest(
    policy: Version,
    against: Annotated[str, typer.Option(metavar="NAME@V", help="The version that judges now.")],
    sample: Annotated[int, typer.Option(min=1, metavar="N", help="Recent submissions to judge, at most.")] = 1000,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the images that flip.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    max_block_rate: Bound = None,
    max_review_rate: Bound = None,
    max_block_increase: Bound = None,
    max_review_increase: Bound = None,
    max_flips: Bound = None,
    max_errors: Bound = None,
) -> None:
    """Judge recent submissions by a version and by the one it would replace, and say what would change.

    Nothing is published or acted upon, and live submissions go first.
    """
    from pipelines.policy_testing import backtest as backtesting  # noqa: PLC0415 - it takes SciPy
    from pipelines.policy_testing.backtest_html import render  # noqa: PLC0415
    from pipelines.policy_testing.backtest_report import ActionThresholds  # noqa: PLC0415

    thresholds = ActionThresholds(
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
        registry.get(*PolicyReference.parse(version).pinned())
    if html and not html.parent.is_dir():
        raise ConfigurationError(f"{html} cannot be written: there is no folder {html.parent}")
    report, pairs = backtesting.backtest(
        before=against,
        after=policy,
        count=sample,
        pictures=html is not None,
        settings=settings,
        progress=lambda line: typer.echo(line, err=True),
    )
    exceeded = report.exceeded(thresholds)
    if html:
        _write(html, render(report, pairs, exceeded=exceeded))
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json") | {"exceeded": exceeded}))
    else:
        typer.echo("\n".join(report.lines()))
    for sentence in exceeded:
        typer.echo(sentence, err=True)
    if exceeded:
        raise typer.Exit(1)


@app.command()
def history(policy: Name, as_json: AsJson = False) -> None:
    """Print every change of a policy's roll-out, oldest first."""
    for change in PolicyRegistry.from_settings(_settings()).history(_name(policy)):
        typer.echo(_change_json(change) if as_json else _change_line(change))


def _read(file: Path) -> Any:
    try:
        return read_document(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from None


def _settings() -> Settings:
    return settings_module.load("policy_bucket")


def _change(change: Callable[[PolicyService, str], Awaitable[Change]], who: str | None, as_json: bool) -> None:
    done = change_policy(_settings(), lambda service: change(service, who or user()))
    typer.echo(_change_json(done) if as_json else _change_line(done))


def _name(name: str) -> str:
    reference = PolicyReference.parse(name)
    if reference.version is not None:
        raise ConfigurationError(f"{name!r} names a version; write {reference.name} alone")
    return reference.name


def _change_json(change: Change) -> str:
    entry = change.model_dump(mode="json", by_alias=True, exclude={"rollout"})
    shared = {"canary": change.rollout.canary, "shadow": change.rollout.shadow}.get(change.action)
    return json.dumps(entry | (shared.model_dump(mode="json", exclude={"version"}) if shared else {}))


def _change_line(change: Change) -> str:
    before = "" if change.previous is None else f" from {change.name}@{change.previous}"
    after = " to none" if change.version is None else f" to {change.name}@{change.version}"
    shared = {"canary": change.rollout.canary, "shadow": change.rollout.shadow}.get(change.action)
    share = f" for {shared.percent:g} %" if shared else ""
    why = f": {change.why}" if change.why else ""
    return f"{change.at:%Y-%m-%d %H:%M:%S}Z {change.action}{before}{after}{share} by {change.who}{why}"


def _row(row: dict[str, Any]) -> str:
    canary, shadow = row["canary"], row["shadow"]
    parts = [
        f"active {row['active']}" if row["active"] else "not active",
        f"{row['versions']} versions",
        f"canary {canary['version']} ({canary['percent']:g} %)" if canary else "",
        f"shadow {shadow['version']} ({shadow['percent']:g} %)" if shadow else "",
        f"circuit breaker open: {', '.join(map(str, row['tripped']))}" if row["tripped"] else "",
    ]
    return f"{row['name']:<24} {', '.join(part for part in parts if part)}"
