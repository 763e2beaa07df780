"""`sluice replay`: judge the image of a verdict again."""

import asyncio
from typing import Annotated

import typer

from pipelines.cli.output import print_progress
from services.core import settings as settings_module
from services.core.errors import SluiceError

# Each command imports what it runs: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def replay(
    verdict_id: Annotated[str, typer.Argument(metavar="VERDICT_ID")],
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as one JSON object.")] = False,
) -> None:
    """Judge again what a verdict was about, and say whether the same comes of it. Nothing is published."""
    from pipelines.clients import streams
    from pipelines.policy_testing import rejudge

    settings = settings_module.load("stream_url", "policy_bucket", "ray_address")
    verdict = asyncio.run(rejudge.find_verdict(verdict_id, settings))
    replayed = rejudge.rejudge(verdict, settings, progress=print_progress)
    if as_json:
        typer.echo(replayed.to_json())
    else:
        found = map(str, replayed.differences) if replayed.differences else [streams.one_line(replayed.after)]
        typer.echo("\n".join(found))
    for note in replayed.notes:
        print_progress(f"note: {note}")
    if not replayed.reproduced:
        raise SluiceError(f"verdict {verdict_id} was not reproduced; fields that differ: {len(replayed.differences)}")
    print_progress(f"verdict {verdict_id} was reproduced")
