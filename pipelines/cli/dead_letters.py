"""`sluice dead-letters` and `sluice reconcile`: list and replay dead letters, and find lost submissions."""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from pipelines.cli.output import print_json, print_line, print_lines, print_progress
from pipelines.cli.times import parse_time
from services.core import settings as settings_module
from services.core.errors import ConfigurationError, DeadLetterReason, SluiceError

if TYPE_CHECKING:
    from pipelines.dead_letters.stored import Selection, StoredDeadLetter

# Every command imports this module, and Kafka's client is slow to import.
# ruff: noqa: PLC0415

app = typer.Typer(help="List and replay dead letters.", no_args_is_help=True)

T = TypeVar("T")

Reasons = Annotated[
    list[str] | None, typer.Option("--reason", metavar="REASON", help="Only this reason. Can be repeated.")
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only submissions of this tenant.")]
Older = Annotated[
    str | None, typer.Option("--older-than", metavar="AGE|TIME", help="Such as 2h, 7d or 2026-11-21T10:00:00Z.")
]
Newer = Annotated[str | None, typer.Option("--newer-than", metavar="AGE|TIME", help="As --older-than.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


@app.command("list")
def list_(
    reason: Reasons = None,
    tenant: Tenant = None,
    older_than: Older = None,
    newer_than: Newer = None,
    as_json: AsJson = False,
) -> None:
    """Print dead letters, oldest first."""
    from pipelines.dead_letters.stored import list_dead_letters

    selection = _make_selection(reason, tenant, older_than, newer_than)
    settings = settings_module.load("stream_url")
    _run(list_dead_letters(settings, selection, write=lambda stored: _print(stored, as_json), progress=print_progress))


@app.command()
def replay(
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="SUBMISSION_ID", help="Only this submission. Can be repeated.")
    ] = None,
    reason: Reasons = None,
    tenant: Tenant = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Replay at most N, oldest first.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the dead letters that would be replayed; publish nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay dead letters: publish each once more, on the stream that it came from. Print them.

    The dead letters stay. `sluice replay` is another command: it judges a verdict again and publishes nothing.
    """
    from pipelines.dead_letters.replay import replay as replay_dead_letters

    selection = _make_selection(reason, tenant, older_than, newer_than, ids)
    settings = settings_module.load("stream_url", "redis_url")
    counts = _run(
        replay_dead_letters(
            settings,
            selection,
            limit=limit,
            dry_run=dry_run,
            write=lambda stored: _print(stored, as_json),
            progress=print_progress,
        )
    )
    skipped = f"; skipped {counts.already_replayed} that were replayed before" if counts.already_replayed else ""
    print_progress(f"{counts.replayed} {'would be replayed' if dry_run else 'replayed'}{skipped}")
    if counts.refused:
        raise SluiceError(f"the stream refused {counts.refused} dead letters; they were not replayed, the others were")


def reconcile(
    since: Annotated[
        str | None, typer.Option(metavar="AGE|TIME", help="Such as 2h, 7d or 2026-11-21T10:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="AGE|TIME", help="As --since. Default: now.")] = None,
    settle_s: Annotated[
        float,
        typer.Option(
            "--settle-s", min=0, help="Count a submission without an outcome as lost only if it is older, in seconds."
        ),
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Count submissions, verdicts and dead letters, and check that every submission has exactly one outcome."""
    from pipelines.reconciliation.reconcile import TimeRange
    from pipelines.reconciliation.reconcile import reconcile as reconcile_streams

    now = datetime.now(UTC)
    time_range = TimeRange(
        since=parse_time(since, now) if since else None, until=parse_time(until, now) if until else None
    )
    settings = settings_module.load("stream_url")
    report = _run(
        reconcile_streams(
            settings,
            time_range,
            settle_s=settle_s,
            write=lambda finding: print_json(finding.to_json()) if as_json else print_line(finding.line()),
            progress=print_progress,
        )
    )
    if as_json:
        print_json(report.to_json())
    else:
        print_lines(report.lines())
    if failure := report.failure(exactly_once=settings.delivery == "exactly_once"):
        raise SluiceError(failure)


def _make_selection(
    reasons: list[str] | None, tenant: str | None, older: str | None, newer: str | None, ids: list[str] | None = None
) -> "Selection":
    from pipelines.dead_letters.stored import Selection

    now = datetime.now(UTC)
    known: tuple[DeadLetterReason, ...] = get_args(DeadLetterReason)
    if unknown := set(reasons or ()) - set(known):
        raise ConfigurationError(f"{', '.join(sorted(unknown))}: no such reason; the reasons are {', '.join(known)}")
    return Selection(
        reasons=[reason for reason in known if reason in (reasons or ())],
        tenant=tenant,
        older_than=parse_time(older, now) if older else None,
        newer_than=parse_time(newer, now) if newer else None,
        ids=frozenset(ids or ()),
    )


def _print(stored: "StoredDeadLetter", as_json: bool) -> None:
    if as_json:
        print_json(stored.to_json())
    else:
        print_line(stored.line())


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
