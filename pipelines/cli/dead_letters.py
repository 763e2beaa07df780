"""`sluice dead-letters` and `sluice reconcile`: what went wrong, what is tried again, whether anything is lost."""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from pipelines.cli.output import print_progress
from pipelines.cli.times import parse_time
from services.core import settings as settings_module
from services.core.errors import ConfigurationError, DeadLetterReason, SluiceError

if TYPE_CHECKING:
    from pipelines.dead_letters.replay import Selection, StoredDeadLetter

# Kafka's client takes a while to import, and every command imports this module.
# ruff: noqa: PLC0415

app = typer.Typer(help="List dead letters, and put them back on their stream.", no_args_is_help=True)

T = TypeVar("T")

Reasons = Annotated[list[str] | None, typer.Option("--reason", metavar="REASON", help="Only those; may be repeated.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only those whose original bytes name it.")]
Older = Annotated[str | None, typer.Option("--older-than", metavar="AGE|TIME", help="2h, 7d, or 2026-11-21T10:00:00Z.")]
Newer = Annotated[str | None, typer.Option("--newer-than", metavar="AGE|TIME", help="Likewise.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command("list")
def list_(
    reason: Reasons = None,
    tenant: Tenant = None,
    older_than: Older = None,
    newer_than: Newer = None,
    as_json: AsJson = False,
) -> None:
    """Print dead letters, oldest first."""
    from pipelines.dead_letters.replay import print_letters

    selection = _selection(reason, tenant, older_than, newer_than)
    settings = settings_module.load("stream_url")
    _run(
        print_letters(
            settings, selection, write=lambda found: typer.echo(_shown(found, as_json)), progress=print_progress
        )
    )


@app.command()
def replay(
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="SUBMISSION_ID", help="Only that; may be repeated.")
    ] = None,
    reason: Reasons = None,
    tenant: Tenant = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many, the oldest.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print those that would go back; publish nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put dead letters back on the stream that they came from, each once; print them. They stay dead letters, too."""
    from pipelines.dead_letters import replay as dead_letters

    selection = _selection(reason, tenant, older_than, newer_than, ids)
    settings = settings_module.load("stream_url", "redis_url")
    done = _run(
        dead_letters.replay(
            settings,
            selection,
            limit=limit,
            dry_run=dry_run,
            write=lambda found: typer.echo(_shown(found, as_json)),
            progress=print_progress,
        )
    )
    before = f"; {done.before} that were replayed before are left alone" if done.before else ""
    print_progress(f"{done.replayed} {'would be replayed' if dry_run else 'replayed'}{before}")
    if done.refused:
        raise SluiceError(f"{done.refused} dead letters were not replayed, because their stream refuses them")


def reconcile(
    since: Annotated[str | None, typer.Option(metavar="AGE|TIME", help="2h, 7d, or 2026-11-21T10:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(metavar="AGE|TIME", help="Likewise; now unless given.")] = None,
    settle_s: Annotated[
        float, typer.Option("--settle-s", min=0, help="Younger ones without an end are in flight.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Count submissions, verdicts and dead letters, and prove that every submission has exactly one end."""
    from pipelines.reconciliation import reconcile as reconciliation

    now = datetime.now(UTC)
    span = reconciliation.Span(
        since=parse_time(since, now) if since else None, until=parse_time(until, now) if until else None
    )
    settings = settings_module.load("stream_url")
    account = _run(
        reconciliation.reconcile(
            settings,
            span,
            settle_s=settle_s,
            write=lambda finding: typer.echo(finding.to_json() if as_json else finding.line()),
            progress=print_progress,
        )
    )
    typer.echo(account.to_json() if as_json else "\n".join(account.lines()))
    if sentence := account.wrong(exactly_once=settings.delivery == "exactly_once"):
        raise SluiceError(sentence)


def _selection(
    reasons: list[str] | None, tenant: str | None, older: str | None, newer: str | None, ids: list[str] | None = None
) -> "Selection":
    from pipelines.dead_letters.replay import Selection

    now = datetime.now(UTC)
    known: tuple[DeadLetterReason, ...] = get_args(DeadLetterReason)
    if unknown := set(reasons or ()) - set(known):
        raise ConfigurationError(f"{', '.join(sorted(unknown))}: no such reason; there are {', '.join(known)}")
    return Selection(
        reasons=[reason for reason in known if reason in (reasons or ())],
        tenant=tenant,
        older_than=parse_time(older, now) if older else None,
        newer_than=parse_time(newer, now) if newer else None,
        ids=frozenset(ids or ()),
    )


def _shown(found: "StoredDeadLetter", as_json: bool) -> str:
    return found.to_json() if as_json else found.line()


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
