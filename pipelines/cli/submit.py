"""`sluice submit`: publish submissions."""

import asyncio
import sys
from typing import Annotated

import typer

from pipelines.cli.output import print_line
from services.core import settings as settings_module

# Each command imports only the modules that it uses: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def submit(
    references: Annotated[
        list[str],
        typer.Argument(metavar="REF...", help="s3:// URIs or files. - reads submissions from stdin as JSON lines."),
    ],
    policy: Annotated[str, typer.Option(help="NAME for the active version, NAME@V for one version.")] = "default",
    tenant: Annotated[str, typer.Option(help="The tenant of the submissions.")] = "default",
) -> None:
    """Submit images and print the id of each submission."""
    from pipelines.clients import streams

    settings = settings_module.load("stream_url")
    submissions = streams.read_references(references, settings, policy=policy, tenant=tenant, lines=sys.stdin.buffer)
    asyncio.run(streams.submit(submissions, settings, on_published=print_line))
