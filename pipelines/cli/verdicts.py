"""`sluice verdicts`: print the verdicts on the stream."""

import asyncio
from typing import Annotated

import typer

from pipelines.cli.output import print_json, print_line, print_progress
from services.core import settings as settings_module

# Each command imports only the modules that it uses: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def verdicts(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="At the end, wait for new verdicts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each verdict as one line of JSON.")] = False,
) -> None:
    """Print the verdicts on the stream, oldest first."""
    from pipelines.clients import streams

    settings = settings_module.load("stream_url")
    try:
        asyncio.run(
            streams.print_verdicts(
                settings,
                follow=follow,
                as_json=as_json,
                write=print_json if as_json else print_line,
                progress=print_progress,
            )
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
